//! API servers for tests: the real one ([`Envtest`]) if `KUBEBUILDER_ASSETS` names its binaries,
//! else `dataplane-fake-apiserver` ([`Server`]).

mod choice;
mod envtest;

pub use choice::{ApiServer, Needs};
pub use dataplane_fake_apiserver::{Objects, Permission, Server, User};
pub use envtest::{Assets, Envtest};
