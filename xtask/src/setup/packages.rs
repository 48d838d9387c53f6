//! Packages of the distribution: the task that needs each, how its presence is detected, and apt.

use std::{path::Path, process::Command, sync::Once};

use anyhow::{Context as _, Result, bail};

use super::{Task, cannot_install};
use crate::process;

/// What shows that a package's content is installed, from whatever source.
#[derive(Clone, Copy, Debug)]
pub(super) enum Presence {
    Program(&'static str),
    File(&'static str),
}

/// A package that a task needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Package {
    task: Task,
    /// Name in Debian and Ubuntu.
    name: &'static str,
    presence: Presence,
}

const PACKAGES: &[Package] = {
    use Presence::{File, Program};
    use Task::{Bench, Build, Kernels, Run};
    const fn package(task: Task, name: &'static str, presence: Presence) -> Package {
        Package { task, name, presence }
    }
    &[
        package(Build, "gcc", Program("cc")),
        package(Build, "libc6-dev", File("/usr/include/stdio.h")),
        package(Run, "iproute2", Program("ip")),
        package(Run, "util-linux", Program("nsenter")),
        package(Run, "iputils-ping", Program("ping")),
        package(Run, "iperf3", Program("iperf3")),
        package(Run, "ethtool", Program("ethtool")),
        package(Run, "dnsmasq-base", Program("dnsmasq")),
        package(Bench, "nftables", Program("nft")),
        package(Bench, "iptables", Program("iptables-restore")),
        package(Kernels, "qemu-system-x86", Program("qemu-system-x86_64")),
        package(Kernels, "busybox-static", Program("busybox")),
        package(Kernels, "iproute2", Program("ip")),
        package(Kernels, "cpio", Program("cpio")),
        package(Kernels, "xz-utils", Program("xz")),
        package(Kernels, "wireguard-tools", Program("wg")),
    ]
};

impl Package {
    pub(super) fn describe(self) -> String {
        let what = match self.presence {
            Presence::Program(name) | Presence::File(name) => name,
        };
        let why = match self.task {
            Task::Build => "to build",
            Task::Run => "for the demo and the tests",
            Task::Bench => "for the benchmark",
            Task::Kernels => "to run other kernels",
        };
        format!("{what}, {why} (package {})", self.name)
    }

    fn is_installed(self) -> bool {
        match self.presence {
            Presence::Program(name) => process::find(name).is_some(),
            Presence::File(path) => Path::new(path).exists(),
        }
    }
}

pub(super) fn missing(tasks: &[Task]) -> Vec<Package> {
    let is_missing = |package: &&Package| tasks.contains(&package.task) && !package.is_installed();
    PACKAGES.iter().filter(is_missing).copied().collect()
}

pub(super) fn install(packages: &[Package]) -> Result<()> {
    let mut names: Vec<&str> = packages.iter().map(|package| package.name).collect();
    names.sort_unstable();
    names.dedup();
    apt_install(&names)
}

/// Installs packages. The error contains the command to run where this process cannot.
pub(super) fn apt_install(names: &[&str]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    if let Some(reason) = cannot_install() {
        bail!(
            "{reason}; install the content of these Debian packages, then run the command again:\n  \
             sudo apt-get install --no-install-recommends {}",
            names.join(" ")
        );
    }
    update()?;
    eprintln!("setup: installing {}", names.join(", "));
    let mut apt = apt();
    apt.args(["install", "--yes", "--no-install-recommends"]).args(names);
    process::run(&mut apt).context("install packages")
}

/// Whether apt can install all of these packages.
pub(super) fn apt_has(names: &[&str]) -> Result<bool> {
    if cannot_install().is_some() {
        return Ok(false);
    }
    update()?;
    let mut simulation = apt();
    simulation.args(["install", "--simulate", "--no-install-recommends"]).args(names);
    Ok(process::output(&mut simulation).is_ok())
}

/// Reads the package lists, which a new machine does not have; once per run.
fn update() -> Result<()> {
    static UPDATED: Once = Once::new();
    let mut result = Ok(());
    UPDATED.call_once(|| {
        eprintln!("setup: reading the package lists");
        result = process::run(apt().arg("update")).context("update the package lists");
    });
    result
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["--quiet", "-o", "Dpkg::Use-Pty=0"]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn description_has_program_task_and_package() {
        let descriptions = PACKAGES.iter().map(|package| package.describe()).collect::<Vec<_>>();
        assert!(
            descriptions.contains(&"iperf3, for the demo and the tests (package iperf3)".to_owned()),
            "{descriptions:?}"
        );
    }

    #[test]
    fn package_is_installed_if_its_program_or_file_exists() {
        let installed = Package { task: Task::Run, name: "a", presence: Presence::Program("sh") };
        let missing = Package { task: Task::Run, name: "b", presence: Presence::File("/nonexistent") };
        assert!(installed.is_installed());
        assert!(!missing.is_installed());
    }
}
