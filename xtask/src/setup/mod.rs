//! `setup`: the tools that this project needs, and their installation.
//!
//! A check takes milliseconds and changes nothing, so every command checks first. apt, rustup and
//! cargo install what is missing; where they cannot, the error contains the command to run.

mod ebpf;
mod packages;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::process;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only list what is missing; the exit code is not 0 if anything is
    #[arg(long)]
    check: bool,
    /// Install only what this task needs (repeatable) [default: all but kernels]
    #[arg(long = "for", value_name = "TASK")]
    tasks: Vec<Task>,
}

/// What the machine is set up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Task {
    /// Compile everything, with the eBPF object
    Build,
    /// Run the demo and the tests
    Run,
    /// Run the benchmark
    Bench,
    /// Run other kernels in QEMU
    Kernels,
}

pub(crate) fn run(arguments: &Args) -> Result<()> {
    let default = [Task::Build, Task::Run, Task::Bench];
    let tasks = if arguments.tasks.is_empty() { &default[..] } else { &arguments.tasks };
    if arguments.check {
        let missing = missing(tasks);
        if !missing.is_empty() {
            bail!("missing:\n{}", list(&missing));
        }
    } else {
        ensure(tasks)?;
    }
    println!("nothing is missing");
    Ok(())
}

/// Installs what is missing. Prints nothing if nothing is.
pub(crate) fn ensure(tasks: &[Task]) -> Result<()> {
    let first = missing(tasks);
    if first.is_empty() {
        return Ok(());
    }
    eprintln!("setup: missing on this machine:\n{}", list(&first));
    packages::install(&packages::missing(tasks))?;
    if tasks.contains(&Task::Build) {
        ebpf::install()?;
    }
    let still = missing(tasks);
    if !still.is_empty() {
        bail!("not found after installation:\n{}", list(&still));
    }
    eprintln!("setup: done");
    Ok(())
}

/// Whether this machine can build the eBPF object.
pub(crate) fn can_build_ebpf() -> bool {
    ebpf::missing().is_empty()
}

/// One line for each missing tool or file.
fn missing(tasks: &[Task]) -> Vec<String> {
    let mut missing: Vec<String> =
        packages::missing(tasks).into_iter().map(packages::Package::describe).collect();
    if tasks.contains(&Task::Build) {
        missing.extend(ebpf::missing());
    }
    missing
}

fn list(lines: &[String]) -> String {
    lines.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

/// The reason why packages cannot be installed on this machine, if there is one.
fn cannot_install() -> Option<&'static str> {
    if process::find("apt-get").is_none() {
        Some("this is neither Debian nor Ubuntu (no apt-get)")
    } else if process::is_root() {
        None
    } else {
        Some("only root can install packages")
    }
}
