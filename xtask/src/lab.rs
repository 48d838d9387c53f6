//! `demo`, `shell`, `bench`: make sure of what they need, build, and hand over to the program that does it.

use std::{ffi::OsString, process::Command};

use anyhow::{Result, bail};

use crate::{
    build, process,
    setup::{self, Purpose},
    workspace,
};

const DEMO: &str = "dataplane-demo";
const BENCH: &str = "dataplane-bench";

/// Passed on as they are: `--help` shows those of the program.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) arguments: Vec<OsString>,
}

pub(crate) fn demo(arguments: &Args) -> Result<()> {
    hand_over(DEMO, &[], arguments, &[Purpose::Build, Purpose::Run])
}

pub(crate) fn shell(arguments: &Args) -> Result<()> {
    hand_over(DEMO, &["shell"], arguments, &[Purpose::Build, Purpose::Run])
}

pub(crate) fn bench(arguments: &Args) -> Result<()> {
    hand_over(BENCH, &[], arguments, &[Purpose::Build, Purpose::Run, Purpose::Bench])
}

fn hand_over(binary: &str, first: &[&str], arguments: &Args, purposes: &[Purpose]) -> Result<()> {
    setup::ensure(purposes)?;
    build::release()?;
    let mut program = Command::new(workspace::binaries("release")?.join(binary));
    program.args(first).args(&arguments.arguments);
    let asks_for_help = arguments.arguments.iter().any(|argument| argument == "--help" || argument == "-h");
    if !process::is_root() && !asks_for_help {
        bail!(
            "network namespaces and eBPF need root; everything is built, so run: sudo {}",
            process::line(&program)
        );
    }
    Err(process::become_program(&mut program))
}
