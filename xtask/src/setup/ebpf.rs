//! The eBPF toolchain: a compiler with the source of `core`, and bpf-linker.
//!
//! The compiler is the one that `dataplane-agent/build.rs` selects: rustup's nightly with
//! `rust-src`, or the distribution's, which rustup has as `debian`. On Debian and Ubuntu the latter
//! is installed, because apt also has the LLVM that the linker needs; elsewhere the nightly.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::packages::{apt_has, apt_install};
use crate::process;

const LINKER: &str = "bpf-linker";
const LINKER_VERSION: &str = "0.13.0";
/// As in the agent's build.rs.
const TOOLCHAIN: &str = "DATAPLANE_EBPF_TOOLCHAIN";
/// rustup's name for the distribution's toolchain.
const DISTRIBUTION: &str = "debian";
/// The distribution's compiler, cargo for it, and the source of `core`.
const COMPILER_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// One line for each missing part.
pub(super) fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if toolchain().is_none() {
        missing.push("a Rust toolchain with the source of `core`, to build the eBPF object".to_owned());
    }
    if !linker_works() {
        missing.push(format!("{LINKER}, to link the eBPF object"));
    }
    missing
}

/// Installs what is missing.
pub(super) fn install() -> Result<()> {
    let toolchain = match toolchain() {
        Some(toolchain) => toolchain,
        None => install_toolchain()?,
    };
    if linker_works() {
        return Ok(());
    }
    install_linker(&toolchain)
}

/// The toolchain that the agent's build.rs selects.
fn toolchain() -> Option<String> {
    if let Ok(name) = env::var(TOOLCHAIN) {
        return Some(name);
    }
    let names = ["nightly", DISTRIBUTION];
    names.into_iter().find(|name| has_core(name)).map(str::to_owned)
}

fn has_core(toolchain: &str) -> bool {
    let mut rustup = Command::new("rustup");
    let sysroot = process::output(rustup.args(["run", toolchain, "rustc", "--print", "sysroot"]));
    sysroot.is_ok_and(|root| Path::new(root.trim()).join("lib/rustlib/src/rust/library/core").is_dir())
}

fn install_toolchain() -> Result<String> {
    if process::find("rustup").is_none() {
        bail!("rustup is not installed: install it from https://rustup.rs, then run the command again");
    }
    if apt_has(&COMPILER_PACKAGES)? {
        apt_install(&COMPILER_PACKAGES)?;
        process::run(Command::new("rustup").args(["toolchain", "link", DISTRIBUTION, "/usr"]))?;
        return Ok(DISTRIBUTION.to_owned());
    }
    let mut nightly = Command::new("rustup");
    nightly.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
    process::run(&mut nightly).context(
        "the eBPF object needs a compiler with the source of `core`: packages rustc-web, cargo-web and rust-web-src \
         of Debian, or rustup's nightly with rust-src; neither could be installed",
    )?;
    Ok("nightly".to_owned())
}

/// Whether the linker is installed and finds its LLVM.
fn linker_works() -> bool {
    linker().is_some_and(|linker| process::output(Command::new(linker).arg("--version")).is_ok())
}

/// The linker in cargo's directory of programs, which is in the `PATH` of what cargo runs, or in
/// `PATH`.
fn linker() -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let installed = cargo_home.map(|home| home.join("bin").join(LINKER)).filter(|file| file.is_file());
    installed.or_else(|| process::find(LINKER))
}

/// Builds the linker against the compiler's LLVM: an older LLVM cannot read the compiler's output.
fn install_linker(toolchain: &str) -> Result<()> {
    let version = process::output(Command::new("rustup").args(["run", toolchain, "rustc", "-vV"]))?;
    let llvm = llvm_major(&version).with_context(|| format!("LLVM version of toolchain {toolchain}"))?;
    let prefix = env::var("LLVM_PREFIX").unwrap_or_else(|_unset| format!("/usr/lib/llvm-{llvm}"));
    let feature = format!("llvm-{llvm}");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.env("LLVM_PREFIX", &prefix);
    cargo.args(["install", LINKER, "--version", LINKER_VERSION, "--locked", "--force"]);
    cargo.args(["--no-default-features", "--features", &feature]);
    let libraries = ["lib/libLLVM.so", "lib/libPolly.a"].map(|file| Path::new(&prefix).join(file));
    let headers = ["/usr/include/zlib.h", "/usr/include/zstd.h"].map(PathBuf::from);
    let is_complete = libraries.iter().chain(&headers).all(|file| file.exists());
    if !is_complete || process::find("g++").is_none() {
        let (dev, polly) = (format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev"));
        apt_install(&[&dev, &polly, "g++", "zlib1g-dev", "libzstd-dev"]).with_context(|| {
            format!(
                "{LINKER} is built against LLVM {llvm}, the LLVM of toolchain {toolchain}; install its development \
                 files, then run: {}",
                process::line(&cargo)
            )
        })?;
    }
    eprintln!("setup: building {LINKER}; this takes minutes, once per machine");
    process::run(&mut cargo)
}

fn llvm_major(version: &str) -> Option<u32> {
    version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_version_is_read_from_the_compilers_version() {
        assert_eq!(llvm_major("rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }
}
