//! An API server in the process of a test ([`Server`]): objects with their history, lists by pages, watches, patches, roles.
//! It can be away, forgetful, slow and wrong on demand.
//!
//! There is no etcd behind it, and nothing acts on objects: no controllers, no garbage collection. What it refuses, it
//! refuses in the words of the real one, but it does not refuse all that the real one does.

mod admission;
mod failure;
mod faults;
mod http;
mod kubeconfig;
mod namespace;
mod objects;
mod patch;
mod paths;
mod rbac;
mod read;
mod resources;
mod select;
mod server;
mod state;
mod store;
mod validate;
mod watch;
mod write;

pub use failure::Failure;
pub use faults::{Drop, Fault, Faults, Requests};
pub use kubeconfig::kubeconfig;
pub use objects::Objects;
pub use rbac::{Use, User};
pub use resources::{RESOURCES, Resource};
pub use server::Server;
pub use state::Behaviour;
