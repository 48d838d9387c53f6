//! A CNI runtime's side, as the specification has it: calls the plugin with environment, stdin, exit code and stdout.
//!
//! [`Runtime`] is a node (a network namespace with `dataplane-cni-agent` in it) and what a runtime knows of it;
//! [`Call`] is one call of the plugin; [`Container`] a namespace for a pod.

mod call;
mod container;
mod runtime;

pub(crate) use call::Call;
pub(crate) use container::Container;
pub(crate) use runtime::{NODE_V4, NODE_V6, Runtime};
