//! The rules that kube-proxy would load, written from the expected output of its tests
//! (`pkg/proxy/{nftables,iptables}/proxier_test.go` of Kubernetes 1.33): the same base chains at
//! the same hooks and priorities, and the same chains per Service and endpoint, marks and
//! connection tracking. Chain names are shorter than kube-proxy's hashes.

pub mod iptables;
pub mod nftables;

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use dataplane_testkit::lab::Namespace;

/// kube-proxy's default `masqueradeBit` 14.
const MASQUERADE_MARK: &str = "0x4000";

/// Loads `rules` with a program in the namespace.
fn load_rules(namespace: &Namespace, program: &str, arguments: &[&str], rules: &str) -> Result<()> {
    namespace.enter(|| {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
        child.stdin.take().context("the child has no stdin")?.write_all(rules.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "{program} failed in {}: {}",
                namespace.name(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    })?
}
