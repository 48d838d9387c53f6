//! The container runtime's side of the CNI specification: calls the plugin with environment and
//! stdin, reads exit code and stdout.
//!
//! [`Runtime`] is a node (a network namespace with `dataplane-cni-agent`) and its runtime; [`Call`]
//! is one call of the plugin; [`Container`] is a pod's namespace.

mod call;
mod container;
mod runtime;

pub(crate) use call::Call;
pub(crate) use container::Container;
pub(crate) use runtime::{NODE_V4, NODE_V6, Runtime};
