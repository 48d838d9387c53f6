//! Builds the eBPF object into `OUT_DIR/dataplane`, which the agent embeds.
//!
//! `core` is compiled for BPF, which needs a toolchain with its source: rustup's nightly with
//! `rust-src`, or the distribution's (toolchain `debian`, linked by `cargo xtask setup`) with
//! unstable features enabled. With `AYA_BUILD_SKIP=1` the object is empty, which is enough for
//! lints and documentation.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use aya_build::{Package, Toolchain};

const EBPF: &str = "../dataplane-ebpf";
const COMMON: &str = "../dataplane-common";
/// Environment variable that overrides the toolchain.
const TOOLCHAIN: &str = "DATAPLANE_EBPF_TOOLCHAIN";

fn main() -> Result<()> {
    println!("cargo:rerun-if-env-changed={TOOLCHAIN}");
    println!("cargo:rerun-if-changed={COMMON}");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let object = out_dir.join("dataplane");
    if env::var_os("AYA_BUILD_SKIP").is_some_and(|skip| skip == "1" || skip == "true") {
        println!("cargo:rerun-if-env-changed=AYA_BUILD_SKIP");
        return fs::write(&object, []).with_context(|| format!("write {}", object.display()));
    }
    let toolchain = toolchain()?;
    let build_dir = build_dir(&out_dir);
    fs::create_dir_all(&build_dir).with_context(|| format!("create {}", build_dir.display()))?;
    // SAFETY: this build script has a single thread. `RUSTC_BOOTSTRAP` allows a stable compiler to
    // build `core`, and has no effect on nightly. aya-build builds below `OUT_DIR`, unless
    // cargo is told of another directory, and reports each line of cargo as a warning.
    unsafe {
        env::set_var("RUSTC_BOOTSTRAP", "1");
        env::set_var("OUT_DIR", &build_dir);
        env::set_var("CARGO_TERM_QUIET", "true");
        env::remove_var("CARGO_BUILD_BUILD_DIR");
    }
    let package = Package { name: "dataplane-ebpf", root_dir: EBPF, ..Package::default() };
    aya_build::build_ebpf([package], Toolchain::Custom(&toolchain)).with_context(|| {
        format!(
            "build the eBPF object with toolchain {toolchain}; `cargo xtask setup` installs what it needs"
        )
    })?;
    let built = build_dir.join("dataplane");
    fs::copy(&built, &object).with_context(|| format!("copy {} to {}", built.display(), object.display()))?;
    Ok(())
}

/// The directory in which the object is built: the same for all profiles and for clippy, which have
/// different `OUT_DIR`s, so that the object is compiled once. Cargo marks its build directory with
/// `CACHEDIR.TAG`, and holds a lock on it while this script runs.
fn build_dir(out_dir: &Path) -> PathBuf {
    let cargo_dir = out_dir.ancestors().find(|directory| directory.join("CACHEDIR.TAG").is_file());
    cargo_dir.unwrap_or(out_dir).join("ebpf")
}

/// The first rustup toolchain with the source of `core`.
fn toolchain() -> Result<String> {
    if let Ok(name) = env::var(TOOLCHAIN) {
        return Ok(name);
    }
    for name in ["nightly", "debian"] {
        if sysroot(name).is_some_and(|root| root.join("lib/rustlib/src/rust/library/core").is_dir()) {
            return Ok(name.to_owned());
        }
    }
    bail!(
        "no Rust toolchain with the source of `core` found (tried nightly, debian): run `cargo xtask setup`"
    )
}

fn sysroot(toolchain: &str) -> Option<PathBuf> {
    let output =
        Command::new("rustup").args(["run", toolchain, "rustc", "--print", "sysroot"]).output().ok()?;
    output.status.success().then(|| Path::new(String::from_utf8_lossy(&output.stdout).trim()).to_owned())
}
