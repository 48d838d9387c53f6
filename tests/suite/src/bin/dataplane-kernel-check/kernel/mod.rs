//! What a kernel makes of the datapath: for `cargo xtask kernels`, which runs this in a machine of its own.
//!
//! Findings go to stdout, one JSON object per line behind [`MARK`], since a kernel's console has other lines too.

mod associations;
mod hooks;
mod programs;
mod traffic;

use std::fs;

use anyhow::{Context as _, Result};
use serde::Serialize;

pub(crate) use hooks::hooks;
pub(crate) use programs::programs;
pub(crate) use traffic::traffic;

/// Begins the line of a finding.
const MARK: &str = "FINDING ";

/// One thing found out about the kernel.
#[derive(Debug, Serialize)]
#[serde(tag = "of", rename_all = "snake_case")]
pub(crate) enum Finding {
    Kernel {
        release: String,
    },
    Program {
        name: &'static str,
        /// What the verifier walked; told from Linux 5.16.
        verified: Option<u32>,
        /// Why the kernel refuses it.
        refused: Option<String>,
    },
    /// How programs come to a place.
    Hook {
        place: &'static str,
        how: Option<&'static str>,
        refused: Option<String>,
    },
    /// What became of some traffic.
    Traffic {
        mode: &'static str,
        what: String,
        failed: Option<String>,
    },
}

impl Finding {
    /// Whether the datapath can work with it.
    fn is_fine(&self) -> bool {
        match self {
            Self::Kernel { .. } => true,
            Self::Program { refused, .. } | Self::Hook { refused, .. } => refused.is_none(),
            Self::Traffic { failed, .. } => failed.is_none(),
        }
    }
}

/// Takes findings as they come: what is found out is told even if what follows hangs.
pub(crate) struct Told {
    is_fine: bool,
}

impl Told {
    pub(crate) const fn nothing() -> Self {
        Self { is_fine: true }
    }

    /// Prints it.
    fn tell(&mut self, finding: &Finding) -> Result<()> {
        self.is_fine &= finding.is_fine();
        println!("{MARK}{}", serde_json::to_string(finding)?);
        Ok(())
    }

    /// Whether all of it was fine.
    pub(crate) const fn is_fine(&self) -> bool {
        self.is_fine
    }
}

/// The running kernel.
pub(crate) fn kernel(told: &mut Told) -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    told.tell(&Finding::Kernel { release: release.trim().to_owned() })
}
