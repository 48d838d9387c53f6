//! Where the workspace and its output are, and cargo.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::process;

/// Compiles for BPF only; `dataplane-agent` builds it.
pub(crate) const EBPF: &str = "dataplane-ebpf";
/// For cargo: everything that compiles for the host. All of it at a time, for other packages would have other features of what they
/// depend on, and all of that would be built again.
pub(crate) const FOR_HOST: [&str; 3] = ["--workspace", "--exclude", EBPF];

/// The repository's top directory.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the workspace")
}

/// The cargo that runs us, at the top directory, as if nobody ran it.
///
/// `cargo run` tells a program which package it is (`CARGO_PKG_NAME` and others). Build scripts that ask for the same variables, as
/// that of `ring` does, would run again, and all that is built upon them, after each change from `cargo xtask` to plain cargo.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_of_a_package) {
            command.env_remove(name);
        }
    }
    command
}

/// Whether a variable of the environment tells a program which package it is (the Cargo book, "Environment variables").
fn is_of_a_package(name: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
        || name == "CARGO_PRIMARY_PACKAGE"
}

/// Where binaries of a profile are.
pub(crate) fn binaries(profile: &str) -> Result<PathBuf> {
    let metadata = metadata()?;
    let target = metadata["target_directory"].as_str().context("cargo metadata: target_directory")?;
    Ok(Path::new(target).join(profile))
}

/// What `cargo metadata` says of the workspace and all it depends on.
pub(crate) fn metadata() -> Result<&'static Value> {
    static METADATA: OnceLock<Value> = OnceLock::new();
    if let Some(metadata) = METADATA.get() {
        return Ok(metadata);
    }
    let text = process::output(cargo().args(["metadata", "--format-version=1", "--locked"]))?;
    let metadata = serde_json::from_str(&text).context("parse the output of cargo metadata")?;
    Ok(METADATA.get_or_init(|| metadata))
}

/// Every file under version control, or about to be, that ends in `.extension`; relative to the top directory.
pub(crate) fn files(extension: &str) -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.current_dir(root()).args(["ls-files", "--cached", "--others", "--exclude-standard", "-z", "--"]);
    let text = process::output(git.arg(format!("*.{extension}")))?;
    let mut files: Vec<PathBuf> =
        text.split_terminator('\0').map(PathBuf::from).filter(|file| root().join(file).is_file()).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cargo_we_run_hears_of_its_directories_and_not_of_our_package() {
        let removed = ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO_BIN_NAME", "CARGO_PRIMARY_PACKAGE"];
        let kept =
            ["CARGO", "CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_BUILD_JOBS", "RUSTUP_TOOLCHAIN", "PATH"];
        assert!(removed.into_iter().all(is_of_a_package));
        assert!(!kept.into_iter().any(is_of_a_package));
    }
}
