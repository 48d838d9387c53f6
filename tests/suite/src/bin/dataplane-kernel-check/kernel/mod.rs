//! Checks of a kernel for `cargo xtask kernels`, which runs this in a virtual machine.
//!
//! Findings go to stdout, one JSON object per line after [`MARK`], because a kernel console has
//! other lines, too.

mod associations;
mod hooks;
mod ipsec;
mod programs;
mod traffic;
mod underlay;

use std::fs;

use anyhow::{Context as _, Result};
use serde::Serialize;

pub(crate) use hooks::hooks;
pub(crate) use programs::programs;
pub(crate) use traffic::traffic;

/// Prefix of the line of a finding.
const MARK: &str = "FINDING ";

/// A result of the check.
#[derive(Debug, Serialize)]
#[serde(tag = "of", rename_all = "snake_case")]
pub(crate) enum Finding {
    Kernel {
        release: String,
    },
    Program {
        name: &'static str,
        /// Instructions that the verifier processed; known since Linux 5.16.
        verified: Option<u32>,
        /// Why the kernel rejects it.
        refused: Option<String>,
    },
    /// How programs are attached to a hook.
    Hook {
        place: &'static str,
        how: Option<&'static str>,
        refused: Option<String>,
    },
    /// Result of one kind of traffic.
    Traffic {
        mode: &'static str,
        what: String,
        failed: Option<String>,
    },
}

impl Finding {
    /// Whether the datapath works with it.
    fn is_supported(&self) -> bool {
        match self {
            Self::Kernel { .. } => true,
            Self::Program { refused, .. } | Self::Hook { refused, .. } => refused.is_none(),
            Self::Traffic { failed, .. } => failed.is_none(),
        }
    }
}

/// Prints findings at once, so that they are not lost if a later check hangs.
pub(crate) struct Findings {
    is_supported: bool,
}

impl Findings {
    pub(crate) const fn new() -> Self {
        Self { is_supported: true }
    }

    /// Prints a finding.
    fn report(&mut self, finding: &Finding) -> Result<()> {
        self.is_supported &= finding.is_supported();
        println!("{MARK}{}", serde_json::to_string(finding)?);
        Ok(())
    }

    /// Whether the datapath works with everything found so far.
    pub(crate) const fn is_supported(&self) -> bool {
        self.is_supported
    }
}

/// The running kernel.
pub(crate) fn kernel(findings: &mut Findings) -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    findings.report(&Finding::Kernel { release: release.trim().to_owned() })
}
