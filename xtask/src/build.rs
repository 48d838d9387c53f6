//! `build`: everything in release.

use anyhow::Result;

use crate::{
    process,
    setup::{self, Purpose},
    workspace,
};

/// What a user starts.
const BINARIES: [&str; 5] =
    ["dataplane-agent", "dataplane-cni", "dataplane-demo", "dataplane-bench", "dataplane-traffic"];

/// The packages of what a user starts; the eBPF object is inside the agent.
const PACKAGES: [&str; 5] =
    ["dataplane-agent", "dataplane-cni", "dataplane-demo", "dataplane-bench", "dataplane-testkit"];

pub(crate) fn run() -> Result<()> {
    setup::ensure(&[Purpose::Build])?;
    release()?;
    let directory = workspace::binaries("release")?;
    for binary in BINARIES {
        let path = directory.join(binary);
        if path.is_file() {
            println!("{}", path.display());
        }
    }
    Ok(())
}

/// Compiles what is not up to date.
pub(crate) fn release() -> Result<()> {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--release", "--bins"]);
    for package in PACKAGES {
        cargo.args(["--package", package]);
    }
    process::run(&mut cargo)
}
