//! Calls the CNI plugin as a container runtime does: environment, JSON on stdin, exit code.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::process::Place;
use crate::bins;

/// The container runtime of a node.
#[derive(Clone, Debug)]
pub(super) struct Runtime {
    place: Place,
    socket: PathBuf,
}

/// The container of a call.
pub(super) struct Container<'a> {
    pub(super) id: &'a str,
    pub(super) netns: &'a Path,
    pub(super) pod: &'a str,
    /// `runtimeConfig`: values for the plugin's capabilities.
    pub(super) runtime_config: &'a Value,
}

impl Runtime {
    pub(super) fn new(place: Place, socket: PathBuf) -> Self {
        Self { place, socket }
    }

    /// Runs the plugin and returns its result, `Null` if it printed none.
    pub(super) fn call(
        &self,
        command: &str,
        container: &Container<'_>,
        previous: Option<&Value>,
    ) -> Result<Value> {
        let mut config = json!({
            "cniVersion": "1.1.0",
            "name": "dataplane",
            "type": "dataplane-cni",
            "agentSocket": self.socket,
            "runtimeConfig": container.runtime_config,
        });
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        let mut child = self
            .place
            .command(bins::cni()?)?
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", container.id)
            .env("CNI_NETNS", container.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", bins::directory()?)
            .env(
                "CNI_ARGS",
                format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={}", container.pod),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start dataplane-cni")?;
        child.stdin.take().context("the plugin has no stdin")?.write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let problem = String::from_utf8_lossy(&output.stderr);
            bail!("CNI {command} of {}: {}: {text}{problem}", container.pod, output.status);
        }
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("CNI {command} printed {text}"))
    }
}
