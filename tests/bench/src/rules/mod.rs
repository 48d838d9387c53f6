//! What kube-proxy would have put into a node's kernel, written from its own expected output
//! (`pkg/proxy/{nftables,iptables}/proxier_test.go` of Kubernetes 1.33): the same base chains at the same hooks and
//! priorities, the same per-service and per-endpoint chains, marks and connection tracking. Names are shorter where
//! kube-proxy hashes.

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

/// Feeds `rules` to a program in the namespace.
fn feed(namespace: &Namespace, program: &str, arguments: &[&str], rules: &str) -> Result<()> {
    namespace.enter(|| {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("run {program}"))?;
        child.stdin.take().context("a child has no stdin")?.write_all(rules.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{program} in {}: {}", namespace.name(), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    })?
}
