//! What `deploy/` holds, as a cluster would get it: from Kustomize, from Helm, and checked against Kubernetes' own types.

pub mod helm;
pub mod kustomize;
pub mod objects;
pub mod schema;

use std::path::{Path, PathBuf};

/// The repository's `deploy/`.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}
