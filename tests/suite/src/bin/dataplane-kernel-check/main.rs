//! Finds out what the running kernel makes of the datapath; `cargo xtask kernels` runs it in QEMU. Needs root.

mod kernel;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};

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
    let mut told = kernel::Told::nothing();
    match Arguments::parse().what {
        What::Programs => {
            kernel::kernel(&mut told)?;
            kernel::programs(&mut told)?;
            kernel::hooks(&mut told)?;
        }
        What::Traffic => kernel::traffic(&mut told)?,
    }
    Ok(if told.is_fine() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
