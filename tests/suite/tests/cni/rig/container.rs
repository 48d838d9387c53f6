//! A container as a runtime creates it: an ID and a network namespace.

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::runtime::unique;
use dataplane_testkit::lab::Namespace;

/// A container's namespace, deleted when this is dropped.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) namespace: Namespace,
}

impl Container {
    /// Creates a namespace for a pod, with an ID of its own.
    pub(crate) fn create() -> Result<Self> {
        let id = unique("c");
        let namespace = Namespace::create(&id)?;
        Ok(Self { id, namespace })
    }

    /// The path for `CNI_NETNS`.
    pub(crate) fn netns(&self) -> String {
        self.namespace.path().to_string_lossy().into_owned()
    }

    /// The output of `ip -j` in the container.
    pub(crate) fn ip_json(&self, arguments: &str) -> Result<Vec<Value>> {
        ip_json(&self.namespace, arguments)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // a test may have deleted it
        let _absent = Namespace::delete(self.namespace.name());
    }
}

/// The output of `ip -j` in a namespace.
pub(super) fn ip_json(namespace: &Namespace, arguments: &str) -> Result<Vec<Value>> {
    let output = std::process::Command::new("ip")
        .args(["-n", namespace.name(), "-j"])
        .args(arguments.split_whitespace())
        .output()
        .context("run ip (package iproute2)")?;
    anyhow::ensure!(
        output.status.success(),
        "ip {arguments} in {}: {}",
        namespace.name(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8_lossy(&output.stdout);
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("ip {arguments}: {text}"))?;
    // filtered rows are empty objects
    Ok(rows.into_iter().filter(|row| row.as_object().is_some_and(|row| !row.is_empty())).collect())
}
