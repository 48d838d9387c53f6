//! Finds out what the running kernel makes of the datapath; `cargo xtask kernels` runs it in QEMU. Needs root.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use dataplane_tests::kernel;

/// Finds out what the running kernel makes of the datapath
#[derive(Debug, Parser)]
struct Arguments {
    what: What,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Load every program and attach it
    Programs,
    /// Send traffic between the pods of two nodes
    Traffic,
}

fn main() -> Result<ExitCode> {
    let looks: &[fn() -> Result<Vec<kernel::Finding>>] = match Arguments::parse().what {
        What::Programs => &[kernel::kernel, kernel::programs, kernel::hooks],
        What::Traffic => &[kernel::traffic],
    };
    let mut is_fine = true;
    // one after the other: what is found out is told even if the next cannot be
    for look in looks {
        for finding in look()? {
            kernel::tell(&finding)?;
            is_fine &= finding.is_fine();
        }
    }
    Ok(if is_fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
