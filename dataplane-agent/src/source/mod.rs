//! Where the agent hears of the cluster: Kubernetes objects in, [`SourceEvent`](crate::state::SourceEvent)s out.
//!
//! Each source reads objects in its own way ([`manifests`]: files; [`kubernetes`]: the API server); what they mean and whether they can be
//! ([`objects`]), and who of two that exclude each other is believed ([`conflicts`]), is the same for all. No map type
//! appears here; no Kubernetes type leaves.

pub mod conflicts;
pub mod kubernetes;
pub mod manifests;
pub mod objects;
mod problems;

pub use kubernetes::{KubernetesSource, Progress};
pub use manifests::{ManifestError, ManifestSource};
pub use problems::{Problem, Problems};
