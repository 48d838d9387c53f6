//! Renders a Kustomize directory with `kubectl kustomize`, as `kubectl apply -k` does.

use std::{
    io::ErrorKind,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::objects;

/// The objects of a Kustomize directory; `None` if kubectl is not installed.
pub(crate) fn build(directory: &Path) -> Result<Option<Vec<Value>>> {
    let mut kubectl = Command::new("kubectl");
    let output = match kubectl.arg("kustomize").arg(directory).stdin(Stdio::null()).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        output => output.context("run kubectl")?,
    };
    if !output.status.success() {
        bail!("kubectl kustomize {}: {}", directory.display(), String::from_utf8_lossy(&output.stderr));
    }
    objects::parse(&String::from_utf8(output.stdout)?).map(Some)
}
