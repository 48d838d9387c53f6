//! Clusters of network namespaces on one machine: nodes with the real agent, pods made by the real CNI plugin, real
//! traffic. Tests, the demo and the benchmark stand on it.

mod fabric;
mod netns;
mod process;
pub mod wait;

pub use fabric::{Fabric, OUTSIDE_V4, OUTSIDE_V6, Segment};
pub use netns::Namespace;
pub use process::{Place, Process, tail};
