//! `demo`, `shell`, `bench`: install what is missing, build, and become the program.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::{
    build, process,
    setup::{self, Task},
};

const DEMO: &str = "dataplane-demo";
const BENCH: &str = "dataplane-bench";

/// What the demo starts, besides the tools of the distribution.
const DEMO_PROGRAMS: [&str; 4] = [DEMO, "dataplane-agent", "dataplane-cni", "dataplane-traffic"];
/// What the benchmark starts, besides the tools of the distribution.
const BENCH_PROGRAMS: [&str; 5] =
    [BENCH, "dataplane-agent", "dataplane-cni", "dataplane-traffic", "dataplane-load"];

/// Arguments for the program; `--help` prints the program's help.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) arguments: Vec<OsString>,
}

pub(crate) fn demo(arguments: &Args) -> Result<()> {
    run_program(&build_demo()?.join(DEMO), &[], arguments)
}

pub(crate) fn shell(arguments: &Args) -> Result<()> {
    run_program(&build_demo()?.join(DEMO), &["shell"], arguments)
}

pub(crate) fn bench(arguments: &Args) -> Result<()> {
    setup::ensure(&[Task::Build, Task::Run, Task::Bench])?;
    let directory = build::production(&BENCH_PROGRAMS, |_cargo| Ok(()))?.join("debug");
    run_program(&directory.join(BENCH), &[], arguments)
}

fn build_demo() -> Result<PathBuf> {
    eprintln!("1/3 install what is missing");
    setup::ensure(&[Task::Build, Task::Run])?;
    eprintln!("2/3 compile agent, eBPF programs and demo: minutes at the first time, seconds later");
    let directory = build::development(&DEMO_PROGRAMS)?;
    eprintln!("3/3 run");
    Ok(directory)
}

/// Becomes the program, with `first` before the user's arguments.
fn run_program(program: &Path, first: &[&str], arguments: &Args) -> Result<()> {
    let mut command = Command::new(program);
    command.args(first).args(&arguments.arguments);
    let is_help = arguments.arguments.iter().any(|argument| argument == "--help" || argument == "-h");
    if !process::is_root() && !is_help {
        bail!(
            "network namespaces and eBPF need root; everything is built, so run: sudo {}",
            process::line(&command)
        );
    }
    Err(process::become_program(&mut command))
}
