//! Packages of the distribution: what each is needed for, how one sees that it is there, and apt.

use std::{path::Path, process::Command, sync::Once};

use anyhow::{Context as _, Result, bail};

use super::{Purpose, cannot_install};
use crate::process;

/// How one sees that something is there, whoever installed it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Evidence {
    Program(&'static str),
    File(&'static str),
}

/// Something a package brings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    purpose: Purpose,
    /// Its name in Debian and Ubuntu.
    package: &'static str,
    evidence: Evidence,
}

const NEEDS: &[Need] = {
    use Evidence::{File, Program};
    use Purpose::{Bench, Build, Kernels, Run};
    const fn need(purpose: Purpose, package: &'static str, evidence: Evidence) -> Need {
        Need { purpose, package, evidence }
    }
    &[
        need(Build, "gcc", Program("cc")),
        need(Build, "libc6-dev", File("/usr/include/stdio.h")),
        need(Run, "iproute2", Program("ip")),
        need(Run, "util-linux", Program("nsenter")),
        need(Run, "iputils-ping", Program("ping")),
        need(Run, "iperf3", Program("iperf3")),
        need(Run, "ethtool", Program("ethtool")),
        need(Run, "dnsmasq-base", Program("dnsmasq")),
        need(Bench, "nftables", Program("nft")),
        need(Bench, "iptables", Program("iptables-restore")),
        need(Kernels, "qemu-system-x86", Program("qemu-system-x86_64")),
        need(Kernels, "busybox-static", Program("busybox")),
        need(Kernels, "iproute2", Program("ip")),
        need(Kernels, "cpio", Program("cpio")),
        need(Kernels, "xz-utils", Program("xz")),
    ]
};

impl Need {
    pub(super) fn describe(self) -> String {
        let what = match self.evidence {
            Evidence::Program(name) | Evidence::File(name) => name,
        };
        let why = match self.purpose {
            Purpose::Build => "to build",
            Purpose::Run => "for the demo and the tests",
            Purpose::Bench => "for the benchmark",
            Purpose::Kernels => "to run other kernels",
        };
        format!("{what}, {why} (package {})", self.package)
    }

    fn is_there(self) -> bool {
        match self.evidence {
            Evidence::Program(name) => process::find(name).is_some(),
            Evidence::File(path) => Path::new(path).exists(),
        }
    }
}

pub(super) fn missing(purposes: &[Purpose]) -> Vec<Need> {
    NEEDS.iter().filter(|need| purposes.contains(&need.purpose) && !need.is_there()).copied().collect()
}

pub(super) fn install(needs: &[Need]) -> Result<()> {
    let mut names: Vec<&str> = needs.iter().map(|need| need.package).collect();
    names.sort_unstable();
    names.dedup();
    apt_install(&names)
}

/// Installs packages, or says which ones somebody else has to install.
pub(super) fn apt_install(names: &[&str]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    if let Some(reason) = cannot_install() {
        bail!(
            "{reason}; install what these packages of Debian hold, then come again:\n  \
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

/// Whether apt could install all of these.
pub(super) fn apt_has(names: &[&str]) -> Result<bool> {
    if cannot_install().is_some() {
        return Ok(false);
    }
    update()?;
    let mut simulation = apt();
    simulation.args(["install", "--simulate", "--no-install-recommends"]).args(names);
    Ok(process::output(&mut simulation).is_ok())
}

/// A fresh machine knows no package at all; one look per run is enough.
fn update() -> Result<()> {
    static UPDATED: Once = Once::new();
    let mut result = Ok(());
    UPDATED.call_once(|| {
        eprintln!("setup: reading the lists of packages");
        result = process::run(apt().arg("update")).context("update the lists of packages");
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
    fn a_need_says_what_it_is_for_and_what_brings_it() {
        let needs = NEEDS.iter().map(|need| need.describe()).collect::<Vec<_>>();
        assert!(
            needs.contains(&"iperf3, for the demo and the tests (package iperf3)".to_owned()),
            "{needs:?}"
        );
    }

    #[test]
    fn only_what_is_not_there_is_missing() {
        let there = Need { purpose: Purpose::Run, package: "a", evidence: Evidence::Program("sh") };
        let absent = Need { purpose: Purpose::Run, package: "b", evidence: Evidence::File("/nonexistent") };
        assert!(there.is_there());
        assert!(!absent.is_there());
    }
}
