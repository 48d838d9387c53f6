//! The programs of the image: which target they are built for, the build, and the proof that they need nothing else.
//!
//! musl where it is installed with a C compiler for it (the TLS library has C in it), else glibc linked statically: what
//! that cannot do, load name services, is not used (`files` and `dns` are inside since glibc 2.34).

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    process,
    setup::{self, Purpose},
    workspace,
};

/// The packages whose programs are in the image; each is named as its program.
pub(super) const PROGRAMS: [&str; 2] = ["dataplane-agent", "dataplane-cni"];

/// Cargo's profile for them.
const PROFILE: &str = "image";

/// The machines we know: Rust's name, Go's, and the ELF number.
const MACHINES: [(&str, &str, u16); 2] = [("x86_64", "amd64", 62), ("aarch64", "arm64", 183)];

/// What is built for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) triple: String,
    /// As images call it.
    pub(super) architecture: &'static str,
    machine: u16,
}

impl Target {
    /// The target of this name, or the best one for this machine.
    pub(super) fn choose(triple: Option<&str>) -> Result<Self> {
        match triple {
            Some(triple) => Self::named(triple),
            None => {
                let musl = format!("{}-unknown-linux-musl", env::consts::ARCH);
                let gnu = format!("{}-unknown-linux-gnu", env::consts::ARCH);
                Self::named(if can_build(&musl) { &musl } else { &gnu })
            }
        }
    }

    fn named(triple: &str) -> Result<Self> {
        let (name, rest) = triple.split_once('-').unwrap_or((triple, ""));
        let known = MACHINES.iter().find(|(known, ..)| *known == name && rest.contains("linux"));
        let Some(&(_, architecture, machine)) = known else {
            bail!("target {triple}: images are for x86_64 and aarch64 Linux");
        };
        Ok(Self { triple: triple.to_owned(), architecture, machine })
    }

    /// The C library that is linked in.
    pub(super) fn is_glibc(&self) -> bool {
        self.triple.contains("gnu")
    }
}

/// Builds the programs, and says in which directory they are.
pub(super) fn build(target: &Target) -> Result<PathBuf> {
    setup::ensure(&[Purpose::Build])?;
    let mut cargo = workspace::cargo();
    // they would take the place of those below
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.args(["build", "--locked", "--bins", "--profile", PROFILE, "--target", &target.triple]);
    cargo.arg("--config").arg(rust_flags(target));
    for program in PROGRAMS {
        cargo.args(["--package", program]);
    }
    process::run(&mut cargo)?;
    workspace::binaries(&format!("{}/{PROFILE}", target.triple))
}

/// Static; and without the names of this machine's directories, so that another one builds the same.
fn rust_flags(target: &Target) -> String {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let mut flags = vec!["-C".to_owned(), "target-feature=+crt-static".to_owned()];
    for (from, to) in [(Some(workspace::root()), "/src"), (cargo_home.as_deref(), "/cargo")] {
        flags.extend(from.map(|from| format!("--remap-path-prefix={}={to}", from.display())));
    }
    format!("target.{}.rustflags={flags:?}", target.triple)
}

/// A program of the directory, if it runs on the target and needs no other file to run.
pub(super) fn read(directory: &Path, program: &str, target: &Target) -> Result<Vec<u8>> {
    let path = directory.join(program);
    let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    check(&content, target).with_context(|| path.display().to_string())?;
    Ok(content)
}

/// ELF of the right machine, with no interpreter: the kernel starts it as it is.
pub(super) fn check(elf: &[u8], target: &Target) -> Result<()> {
    const INTERPRETER: u32 = 3;
    let field = |at: usize, length: usize| elf.get(at..at + length).context("cut short");
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "no 64-bit little-endian ELF file");
    let short = |at| Ok::<_, anyhow::Error>(u16::from_le_bytes(field(at, 2)?.try_into()?));
    let machine = short(0x12)?;
    ensure!(machine == target.machine, "made for machine {machine}, not for {}", target.architecture);
    let table = u64::from_le_bytes(field(0x20, 8)?.try_into()?) as usize;
    let (size, count) = (usize::from(short(0x36)?), usize::from(short(0x38)?));
    for number in 0..count {
        let kind = u32::from_le_bytes(field(table + number * size, 4)?.try_into()?);
        ensure!(kind != INTERPRETER, "linked dynamically: an image of it alone could not run it");
    }
    Ok(())
}

/// Whether Rust's library for the target is installed, and something that compiles C for it.
fn can_build(triple: &str) -> bool {
    let mut rustc = Command::new("rustc");
    let library = process::output(rustc.args(["--print", "target-libdir", "--target", triple]));
    let has_library = library.is_ok_and(|path| Path::new(path.trim()).is_dir());
    let compiler = format!("{}-linux-musl-gcc", env::consts::ARCH);
    has_library && ["musl-gcc", &compiler].iter().any(|name| process::find(name).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_architecture_is_the_targets() {
        assert_eq!(Target::choose(Some("aarch64-unknown-linux-musl")).unwrap().architecture, "arm64");
        assert_eq!(Target::choose(Some("x86_64-unknown-linux-gnu")).unwrap().architecture, "amd64");
        for bad in ["x86_64-pc-windows-msvc", "riscv64gc-unknown-linux-gnu", "x86_64"] {
            let error = Target::choose(Some(bad)).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }

    #[test]
    fn a_dynamic_program_of_the_wrong_machine_or_none_at_all_is_refused() {
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
            (b"#!/bin/sh".to_vec(), "no 64-bit"),
        ] {
            let error = check(&bad, &target).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
