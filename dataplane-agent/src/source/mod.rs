//! Sources of cluster state: Kubernetes objects in, [`SourceEvent`](crate::state::SourceEvent)s
//! out.
//!
//! Each source has its own transport: [`manifests`] reads files, [`kubernetes`] watches the API
//! server. Validation of single objects ([`objects`]) and the choice between objects that exclude
//! each other ([`conflicts`]) are shared. No map type enters this module and no Kubernetes type
//! leaves it.

pub mod conflicts;
pub mod kubernetes;
pub mod manifests;
pub mod objects;
mod problems;

pub use kubernetes::{KubernetesSource, Progress};
pub use manifests::{ManifestError, ManifestSource};
pub use problems::{Problem, Problems};
