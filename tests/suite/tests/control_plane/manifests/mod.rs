//! What `deploy/` holds, as a cluster would get it: from Kustomize, from Helm, and checked against Kubernetes' own types.

pub(crate) mod helm;
pub(crate) mod kustomize;
pub(crate) mod objects;
pub(crate) mod schema;

use std::path::{Path, PathBuf};

/// The repository's `deploy/`.
pub(crate) fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}
