//! The machine of a run, as far as it explains the results.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use super::rules::iptables;

#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub date: String,
    pub commit: String,
    pub kernel: String,
    pub processor: String,
    pub processors: usize,
    pub memory_gib: u64,
    pub hypervisor: bool,
    pub iptables: &'static str,
}

impl Machine {
    /// Inspects this machine.
    ///
    /// # Errors
    /// The eBPF JIT is off, or the machine has only one processor.
    pub fn inspect() -> Result<Self> {
        let jit =
            fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").context("cannot read bpf_jit_enable")?;
        ensure!(jit.trim() != "0", "the eBPF JIT is off: set net.core.bpf_jit_enable to 1");
        let processors = std::thread::available_parallelism()?.get();
        ensure!(
            processors >= 2,
            "the benchmark needs at least two processors, this machine has {processors}"
        );
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
        let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        let total_kib: u64 = field(&meminfo, "MemTotal").trim_end_matches(" kB").parse().unwrap_or_default();
        Ok(Self {
            date: first_line(Command::new("date").args(["--utc", "+%Y-%m-%d %H:%M UTC"])),
            commit: first_line(Command::new("git").args(["rev-parse", "--short", "HEAD"])),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor: field(&cpuinfo, "model name").to_owned(),
            processors,
            memory_gib: total_kib >> 20,
            hypervisor: field(&cpuinfo, "flags").split(' ').any(|flag| flag == "hypervisor"),
            iptables: iptables::Backend::best().restore(),
        })
    }

    /// Returns a one-line description.
    pub fn line(&self) -> String {
        let kind = if self.hypervisor { "virtual processors" } else { "processors" };
        format!(
            "{} × {} ({kind}), {} GiB, Linux {}",
            self.processors, self.processor, self.memory_gib, self.kernel
        )
    }
}

/// Returns the steal time and the total time since boot in ticks.
pub fn stolen() -> Result<(u64, u64)> {
    let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is part of user time
    Ok((ticks.get(7).copied().unwrap_or_default(), ticks.iter().take(8).sum()))
}

fn field<'a>(text: &'a str, name: &str) -> &'a str {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    value.unwrap_or("unknown").trim()
}

fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    output.unwrap_or_default().lines().next().unwrap_or("unknown").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_field_is_unknown() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n";
        assert_eq!(field(text, "model name"), "Some CPU @ 2 GHz");
        assert_eq!(field(text, "flags"), "unknown");
    }
}
