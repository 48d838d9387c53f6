//! Checks how the datapath works on the running kernel; `cargo xtask kernels` runs it in QEMU.
//! Needs root.

mod kernel;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};

/// Checks how the datapath works on the running kernel
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
    let mut findings = kernel::Findings::new();
    match Arguments::parse().what {
        What::Programs => {
            kernel::kernel(&mut findings)?;
            kernel::programs(&mut findings)?;
            kernel::hooks(&mut findings)?;
        }
        What::Traffic => kernel::traffic(&mut findings)?,
    }
    Ok(if findings.is_supported() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
