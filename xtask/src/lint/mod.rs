//! `lint`: everything that can be said about the code without running it. All checks run; then it fails if one did.

mod boundaries;
mod licences;
mod links;
mod sizes;

use std::{process::Command, time::Instant};

use anyhow::{Result, bail};

use crate::{process, setup, workspace};

/// A check, and how it ended when it did not fail.
type Check = (&'static str, fn() -> Result<Outcome>);

/// Not failed.
pub(crate) enum Outcome {
    Ok,
    /// Ok, and there is something to say.
    Note(String),
}

/// The documentation is for readers of the code: it shows private items, so links may lead there.
const DOCUMENTATION: &str = "-Dwarnings -Arustdoc::private-intra-doc-links";

const CHECKS: [Check; 9] = [
    ("format", format),
    ("boundaries", boundaries::check),
    ("file sizes", sizes::check),
    ("links", links::check),
    ("licences", licences::check),
    ("clippy", clippy),
    ("clippy of the eBPF crate", clippy_ebpf),
    ("documentation", documentation),
    ("documentation of the eBPF crate", documentation_ebpf),
];

pub(crate) fn run() -> Result<()> {
    let mut lines = Vec::new();
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        let start = Instant::now();
        let result = check();
        let took = start.elapsed();
        lines.push(match result {
            Ok(Outcome::Ok) => format!("ok    {name} ({took:.1?})"),
            Ok(Outcome::Note(note)) => format!("ok    {name} ({took:.1?})\n{note}"),
            Err(error) => {
                failed.push(name);
                format!("FAIL  {name} ({took:.1?}): {error:#}")
            }
        });
        eprintln!("{}", lines[lines.len() - 1]);
    }
    println!("\nlint:\n{}", lines.join("\n"));
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join(", "));
    }
    Ok(())
}

fn format() -> Result<Outcome> {
    process::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;
    Ok(Outcome::Ok)
}

/// With the real eBPF object where it can be built: then the tests need not build the agent's build script again.
fn clippy() -> Result<Outcome> {
    let mut cargo = workspace::cargo();
    cargo.args(["clippy", "--keep-going"]).args(workspace::FOR_HOST);
    cargo.args(["--all-targets", "--", "-Dwarnings"]);
    process::run(without_object_if_need_be(&mut cargo))?;
    Ok(Outcome::Ok)
}

/// For the host: the same code, without a second toolchain's clippy and a second `core`. In release, because that
/// profile aborts on panic, as BPF does.
fn clippy_ebpf() -> Result<Outcome> {
    process::run(workspace::cargo().args([
        "clippy",
        "--release",
        "--package",
        workspace::EBPF,
        "--",
        "-Dwarnings",
    ]))?;
    Ok(Outcome::Ok)
}

fn documentation() -> Result<Outcome> {
    let mut cargo = workspace::cargo();
    cargo.args(["doc", "--no-deps", "--document-private-items"]).args(workspace::FOR_HOST);
    process::run(without_object_if_need_be(cargo.env("RUSTDOCFLAGS", DOCUMENTATION)))?;
    Ok(Outcome::Ok)
}

fn documentation_ebpf() -> Result<Outcome> {
    let mut cargo = workspace::cargo();
    cargo.args(["doc", "--no-deps", "--document-private-items", "--release", "--package", workspace::EBPF]);
    process::run(cargo.env("RUSTDOCFLAGS", DOCUMENTATION))?;
    Ok(Outcome::Ok)
}

fn without_object_if_need_be(cargo: &mut Command) -> &mut Command {
    if setup::can_build_ebpf() { cargo } else { cargo.env("AYA_BUILD_SKIP", "1") }
}
