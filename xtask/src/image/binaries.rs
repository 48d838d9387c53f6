//! The programs of the image: their target, their build, and the check that they need no other
//! file.
//!
//! This machine's C library is linked statically, and dependencies are those that demo and tests
//! have compiled. `--target` chooses another one: musl, or another machine. glibc cannot load name
//! services then, and the agent uses none (`files` and `dns` are part of glibc since 2.34).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::rustc;
use crate::{
    build, process,
    setup::{self, Task},
};

/// The packages whose programs are in the image; each program has the name of its package.
pub(super) const PROGRAMS: [&str; 2] = ["dataplane-agent", "dataplane-cni"];

/// The machines that images are for: Rust's name, Go's name, and the ELF number.
const MACHINES: [(&str, &str, u16); 2] = [("x86_64", "amd64", 62), ("aarch64", "arm64", 183)];

/// What the programs run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) triple: String,
    /// Go's name, which images use.
    pub(super) architecture: &'static str,
    machine: u16,
    /// Whether it is passed to cargo. If not, cargo builds for this machine and reuses what is
    /// compiled already.
    is_explicit: bool,
}

impl Target {
    /// The target of this name, or this machine.
    pub(super) fn choose(triple: Option<&str>) -> Result<Self> {
        match triple {
            Some(triple) => Self::named(triple, true),
            None => {
                let version = process::output(Command::new("rustc").arg("-vV"))?;
                let host = version.lines().find_map(|line| line.strip_prefix("host: "));
                Self::named(host.context("rustc -vV names no host")?, false)
            }
        }
    }

    fn named(triple: &str, is_explicit: bool) -> Result<Self> {
        let (name, rest) = triple.split_once('-').unwrap_or((triple, ""));
        let known = MACHINES.iter().find(|(known, ..)| *known == name && rest.contains("linux"));
        let Some(&(_, architecture, machine)) = known else {
            bail!("target {triple}: images are for x86_64 and aarch64 Linux");
        };
        Ok(Self { triple: triple.to_owned(), architecture, machine, is_explicit })
    }

    /// Whether glibc is linked in, not musl.
    pub(super) fn is_glibc(&self) -> bool {
        self.triple.contains("gnu")
    }
}

/// Builds the programs. Returns their directory.
pub(super) fn build(target: &Target) -> Result<PathBuf> {
    setup::ensure(&[Task::Build])?;
    let mut directory = build::production(&PROGRAMS, |cargo| {
        if target.is_explicit {
            cargo.args(["--target", &target.triple]);
        }
        rustc::configure(cargo)
    })?;
    if target.is_explicit {
        directory.push(&target.triple);
    }
    Ok(directory.join("debug"))
}

/// Reads a program of the directory. Fails unless it runs on the target without any other file.
pub(super) fn read(directory: &Path, program: &str, target: &Target) -> Result<Vec<u8>> {
    let path = directory.join(program);
    let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    check(&content, target).with_context(|| path.display().to_string())?;
    Ok(content)
}

/// Fails unless it is an ELF file for the target's machine without an interpreter, which is what
/// statically linked means to the kernel.
pub(super) fn check(elf: &[u8], target: &Target) -> Result<()> {
    const INTERPRETER: u32 = 3;
    let field = |at: usize, length: usize| elf.get(at..at + length).context("cut short");
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let short = |at| Ok::<_, anyhow::Error>(u16::from_le_bytes(field(at, 2)?.try_into()?));
    let machine = short(0x12)?;
    ensure!(machine == target.machine, "built for ELF machine {machine}, not for {}", target.architecture);
    let table = u64::from_le_bytes(field(0x20, 8)?.try_into()?) as usize;
    let (size, count) = (usize::from(short(0x36)?), usize::from(short(0x38)?));
    for number in 0..count {
        let kind = u32::from_le_bytes(field(table + number * size, 4)?.try_into()?);
        ensure!(kind != INTERPRETER, "linked dynamically: the image has no dynamic linker");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architecture_is_that_of_the_target() {
        assert_eq!(Target::choose(Some("aarch64-unknown-linux-musl")).unwrap().architecture, "arm64");
        assert_eq!(Target::choose(Some("x86_64-unknown-linux-gnu")).unwrap().architecture, "amd64");
        for bad in ["x86_64-pc-windows-msvc", "riscv64gc-unknown-linux-gnu", "x86_64"] {
            let error = Target::choose(Some(bad)).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }

    #[test]
    fn dynamic_program_and_program_of_another_machine_are_refused() {
        let target = Target::choose(Some("x86_64-unknown-linux-gnu")).unwrap();
        // one program header, of type `kind`
        let elf = |machine: u8, kind: u8| {
            let mut elf = vec![0; 0x40 + 56];
            elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
            (elf[0x12], elf[0x20], elf[0x36], elf[0x38], elf[0x40]) = (machine, 0x40, 56, 1, kind);
            elf
        };
        check(&elf(62, 1), &target).unwrap();
        for (bad, why) in [
            (elf(62, 3), "dynamically"),
            (elf(183, 1), "machine 183"),
            (elf(62, 1)[..0x40].to_vec(), "cut short"),
            (b"#!/bin/sh".to_vec(), "not a 64-bit"),
        ] {
            let error = check(&bad, &target).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
