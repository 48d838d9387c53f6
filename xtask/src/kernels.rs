//! `kernels`: the datapath on other kernels, in QEMU.

use anyhow::{Result, bail};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Version to run; all known ones without it
    #[arg(long = "kernel", value_name = "VERSION")]
    kernels: Vec<String>,
}

pub(crate) fn run(arguments: Args) -> Result<()> {
    bail!("no kernel is known yet (asked for: {:?})", arguments.kernels)
}
