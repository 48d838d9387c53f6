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
    let object = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?).join("dataplane");
    if env::var_os("AYA_BUILD_SKIP").is_some_and(|skip| skip == "1" || skip == "true") {
        println!("cargo:rerun-if-env-changed=AYA_BUILD_SKIP");
        return fs::write(&object, []).with_context(|| format!("write {}", object.display()));
    }
    let toolchain = toolchain()?;
    // SAFETY: this build script has a single thread. Allows a stable compiler to build `core`; no
    // effect on nightly.
    unsafe { env::set_var("RUSTC_BOOTSTRAP", "1") };
    let package = Package { name: "dataplane-ebpf", root_dir: EBPF, ..Package::default() };
    aya_build::build_ebpf([package], Toolchain::Custom(&toolchain)).with_context(|| {
        format!(
            "build the eBPF object with toolchain {toolchain}; `cargo xtask setup` installs what it needs"
        )
    })
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
