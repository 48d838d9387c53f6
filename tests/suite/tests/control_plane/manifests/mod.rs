//! The manifests in `deploy/`, rendered by Kustomize and by Helm, and checked against the types of
//! the Kubernetes API.

pub(crate) mod helm;
pub(crate) mod kustomize;
pub(crate) mod objects;
pub(crate) mod schema;

use std::path::{Path, PathBuf};

/// The repository's `deploy/`.
pub(crate) fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}
