//! An API server in the process of a test ([`Server`]): versioned objects, paginated lists,
//! watches, patches and RBAC. A test can stop it, compact its history, delay responses, and inject
//! errors.
//!
//! It has no etcd, no controllers and no garbage collection. Its error messages are those of the
//! real server, but it does not validate everything that the real server validates.

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
pub use faults::{Fault, Faults, Requests, WatchEnd};
pub use kubeconfig::kubeconfig;
pub use objects::Objects;
pub use rbac::{Permission, User};
pub use resources::{RESOURCES, Resource};
pub use server::Server;
pub use state::Behaviour;
