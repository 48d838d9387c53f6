//! `build`, and the one selection of packages, features and profile that demo, tests, benchmark and
//! image share: each reuses what the others compiled.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    process,
    setup::{self, Task},
    workspace,
};

/// The programs that a user starts. The eBPF object is embedded in the agent.
const PROGRAMS: [&str; 5] =
    ["dataplane-agent", "dataplane-cni", "dataplane-demo", "dataplane-bench", "dataplane-traffic"];

/// For cargo: optimises our crates.
const PRODUCTION: &str = "xtask/src/production.toml";

pub(crate) fn run() -> Result<()> {
    setup::ensure(&[Task::Build])?;
    let directory = development(&PROGRAMS)?;
    for program in PROGRAMS {
        println!("{}", directory.join(program).display());
    }
    Ok(())
}

/// Compiles programs as the tests use them. Returns their directory.
pub(crate) fn development(programs: &[&str]) -> Result<PathBuf> {
    process::run(&mut cargo_build(programs))?;
    workspace::development_programs()
}

/// Compiles programs for the image and the benchmark: our crates are optimised and have no debug
/// assertions. `configure` adds options. Returns cargo's target directory for them, which is not
/// that of [`development`].
pub(crate) fn production(
    programs: &[&str],
    configure: impl FnOnce(&mut Command) -> Result<()>,
) -> Result<PathBuf> {
    let directory = workspace::target_directory()?.join("production");
    let mut cargo = cargo_build(programs);
    // what is compiled on the way stays where the other commands find it
    cargo.env("CARGO_BUILD_BUILD_DIR", workspace::build_directory()?);
    cargo.arg("--target-dir").arg(&directory).args(["--config", PRODUCTION]);
    configure(&mut cargo)?;
    process::run(&mut cargo)?;
    Ok(directory)
}

/// `cargo build` of some programs, with the features that the whole workspace selects.
fn cargo_build(programs: &[&str]) -> Command {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--locked"]).args(workspace::FOR_HOST);
    for program in programs {
        cargo.args(["--bin", program]);
    }
    cargo
}
