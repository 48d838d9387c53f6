//! `setup`: what this project needs from the machine, and how it gets there.
//!
//! Looking costs milliseconds and touches nothing, so every command looks first. Installing is apt's, rustup's and
//! cargo's business; where they cannot, the sentence to type is printed instead.

mod ebpf;
mod packages;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::process;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only report what is missing; the exit code says whether anything is
    #[arg(long)]
    check: bool,
    /// Only what this needs (repeatable); without it, all but `kernels`
    #[arg(long = "for", value_name = "PURPOSE")]
    purposes: Vec<Purpose>,
}

/// What something is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// Compiling, the eBPF object too
    Build,
    /// The demo and the tests
    Run,
    /// The benchmark's peers
    Bench,
    /// Other kernels in QEMU
    Kernels,
}

pub(crate) fn run(arguments: &Args) -> Result<()> {
    let default = [Purpose::Build, Purpose::Run, Purpose::Bench];
    let purposes = if arguments.purposes.is_empty() { &default[..] } else { &arguments.purposes };
    if arguments.check {
        let missing = missing(purposes);
        if !missing.is_empty() {
            bail!("missing:\n{}", list(&missing));
        }
    } else {
        ensure(purposes)?;
    }
    println!("nothing is missing");
    Ok(())
}

/// Installs what is missing. Silent and quick when nothing is.
pub(crate) fn ensure(purposes: &[Purpose]) -> Result<()> {
    let first = missing(purposes);
    if first.is_empty() {
        return Ok(());
    }
    eprintln!("setup: this machine lacks\n{}", list(&first));
    packages::install(&packages::missing(purposes))?;
    if purposes.contains(&Purpose::Build) {
        ebpf::install()?;
    }
    let still = missing(purposes);
    if !still.is_empty() {
        bail!("installed, but still not found:\n{}", list(&still));
    }
    eprintln!("setup: done");
    Ok(())
}

/// Whether the eBPF object can be built here.
pub(crate) fn can_build_ebpf() -> bool {
    ebpf::missing().is_empty()
}

/// One line for each thing missing.
fn missing(purposes: &[Purpose]) -> Vec<String> {
    let mut missing: Vec<String> =
        packages::missing(purposes).into_iter().map(packages::Need::describe).collect();
    if purposes.contains(&Purpose::Build) {
        missing.extend(ebpf::missing());
    }
    missing
}

fn list(lines: &[String]) -> String {
    lines.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

/// Why nothing can be installed on this machine, if so.
fn cannot_install() -> Option<&'static str> {
    if process::find("apt-get").is_none() {
        Some("this is no Debian or Ubuntu (no apt-get)")
    } else if process::is_root() {
        None
    } else {
        Some("only root can install packages")
    }
}
