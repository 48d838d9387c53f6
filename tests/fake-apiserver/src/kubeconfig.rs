//! Writes a kubeconfig.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

/// Returns a kubeconfig with one cluster and one user; `authority` is the CA file for TLS.
pub fn kubeconfig(url: &str, token: &str, authority: Option<&Path>) -> Result<String> {
    let mut cluster = json!({"server": url});
    if let Some(authority) = authority {
        cluster["certificate-authority"] = json!(authority);
    }
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": cluster}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user"}}],
        "current-context": "lab",
    });
    serde_norway::to_string(&config).context("cannot write the kubeconfig")
}
