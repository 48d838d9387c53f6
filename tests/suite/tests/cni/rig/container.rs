//! A container as a runtime makes it: an ID and a network namespace.

use anyhow::{Context as _, Result};
use serde_json::Value;

use dataplane_testkit::lab::Namespace;

/// A container's namespace. Deleted with this.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) namespace: Namespace,
}

impl Container {
    pub(super) fn new(id: String) -> Result<Self> {
        let namespace = Namespace::create(&id)?;
        Ok(Self { id, namespace })
    }

    /// What a runtime calls `CNI_NETNS`.
    pub(crate) fn netns(&self) -> String {
        self.namespace.path().to_string_lossy().into_owned()
    }

    /// What `ip -j` answers in the container.
    pub(crate) fn ask(&self, question: &str) -> Result<Vec<Value>> {
        ask(&self.namespace, question)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // a test may have deleted it
        let _absent = Namespace::delete(self.namespace.name());
    }
}

/// What `ip -j` answers in a namespace.
pub(super) fn ask(namespace: &Namespace, question: &str) -> Result<Vec<Value>> {
    let output = std::process::Command::new("ip")
        .args(["-n", namespace.name(), "-j"])
        .args(question.split_whitespace())
        .output()
        .context("run ip (package iproute2)")?;
    anyhow::ensure!(
        output.status.success(),
        "ip {question} in {}: {}",
        namespace.name(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8_lossy(&output.stdout);
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("ip {question}: {text}"))?;
    // filtered rows are empty objects
    Ok(rows.into_iter().filter(|row| row.as_object().is_some_and(|row| !row.is_empty())).collect())
}
