//! The API server of a cluster: the real one ([`Envtest`]) where `KUBEBUILDER_ASSETS` says where it is, or else the one of the
//! tests ([`Server`]).

mod choice;
mod envtest;

pub use choice::{ApiServer, Needs};
pub use dataplane_fake_apiserver::{Objects, Permission, Server, User};
pub use envtest::{Assets, Envtest};
