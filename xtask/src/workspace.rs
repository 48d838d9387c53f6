//! The workspace's directories, its files, and cargo.

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
/// For cargo: all packages that compile for the host. Every command selects all of them, because a
/// part of them selects other features of dependencies, and cargo would compile those dependencies
/// again.
pub(crate) const FOR_HOST: [&str; 3] = ["--workspace", "--exclude", EBPF];

/// The repository's top directory.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the workspace")
}

/// The cargo that runs this program, in the top directory, with the environment that it has in a
/// shell.
///
/// `cargo run` sets `CARGO_PKG_NAME` and others. Build scripts that read such variables, for
/// example that of `ring`, would run again after each change between `cargo xtask` and plain cargo,
/// and their dependents would be compiled again.
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

/// Whether cargo sets an environment variable for the package that it runs (the Cargo book,
/// "Environment variables").
fn is_of_a_package(name: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
        || name == "CARGO_PRIMARY_PACKAGE"
}

/// The directory of the programs that demo and tests use.
pub(crate) fn development_programs() -> Result<PathBuf> {
    Ok(target_directory()?.join("debug"))
}

/// Cargo's target directory.
pub(crate) fn target_directory() -> Result<PathBuf> {
    directory("target_directory")
}

/// Cargo's directory for what it compiles on the way to a program.
pub(crate) fn build_directory() -> Result<PathBuf> {
    directory("build_directory")
}

fn directory(field: &str) -> Result<PathBuf> {
    let directory = metadata()?[field].as_str().with_context(|| format!("cargo metadata: no {field}"))?;
    Ok(directory.into())
}

/// The output of `cargo metadata` for the workspace and its dependencies.
pub(crate) fn metadata() -> Result<&'static Value> {
    static METADATA: OnceLock<Value> = OnceLock::new();
    if let Some(metadata) = METADATA.get() {
        return Ok(metadata);
    }
    let text = process::output(cargo().args(["metadata", "--format-version=1", "--locked"]))?;
    let metadata = serde_json::from_str(&text).context("parse the output of cargo metadata")?;
    Ok(METADATA.get_or_init(|| metadata))
}

/// All files with this extension that git tracks or does not ignore, relative to the top directory.
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
    fn cargo_gets_no_variables_of_the_package_that_runs_it() {
        let removed = ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO_BIN_NAME", "CARGO_PRIMARY_PACKAGE"];
        let kept =
            ["CARGO", "CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_BUILD_JOBS", "RUSTUP_TOOLCHAIN", "PATH"];
        assert!(removed.into_iter().all(is_of_a_package));
        assert!(!kept.into_iter().any(is_of_a_package));
    }
}
