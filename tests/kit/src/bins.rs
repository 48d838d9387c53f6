//! Paths of the built binaries under test. Builds nothing.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// Overrides the directory of the binaries.
const DIRECTORY: &str = "DATAPLANE_BIN_DIR";

/// The agent.
pub fn agent() -> Result<PathBuf> {
    find("dataplane-agent", "dataplane-agent")
}

/// The CNI plugin.
pub fn cni() -> Result<PathBuf> {
    find("dataplane-cni", "dataplane-cni")
}

/// The traffic tool that runs inside pods.
pub fn traffic() -> Result<PathBuf> {
    find("dataplane-traffic", "dataplane-testkit")
}

/// The load generator of the benchmark.
pub fn load() -> Result<PathBuf> {
    find("dataplane-load", "dataplane-bench")
}

/// The directory of all binaries, also used as `CNI_PATH`.
pub fn directory() -> Result<PathBuf> {
    if let Some(directory) = env::var_os(DIRECTORY) {
        return Ok(directory.into());
    }
    let exe = env::current_exe().context("find the running executable")?;
    let directory = exe.parent().context("the running executable has no directory")?;
    // tests run from `target/<profile>/deps`, binaries from `target/<profile>`
    let is_deps = directory.file_name().is_some_and(|name| name == "deps");
    Ok(if is_deps { directory.parent().unwrap_or(directory) } else { directory }.to_owned())
}

fn find(name: &str, package: &str) -> Result<PathBuf> {
    let path = directory()?.join(name);
    if !Path::is_file(&path) {
        bail!(
            "{} does not exist: run `cargo xtask build` or `cargo build -p {package}`, or set {DIRECTORY}",
            path.display()
        );
    }
    Ok(path)
}
