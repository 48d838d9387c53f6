//! Clusters of network namespaces on one machine: nodes with the real agent, pods made by the real CNI plugin, real
//! traffic. Tests, the demo and the benchmark stand on it.

mod agent;
mod checks;
mod cluster;
mod cni;
mod driver;
mod evidence;
mod fabric;
mod family;
mod feed;
pub mod interrupt;
mod losses;
mod netns;
mod node;
mod objects;
mod peer;
mod pod;
mod process;
mod site;
mod traffic;
pub mod wait;

pub use agent::Agent;
pub use checks::Checks;
pub use cluster::{Cluster, Routing, Spec, attach_to_pod, service_addresses};
pub use fabric::{Fabric, OUTSIDE_V4, OUTSIDE_V6, Segment, outside};
pub use family::Family;
pub use feed::{Control, Source, agent_user};
pub use interrupt::{at_end, is_interrupted};
pub use netns::Namespace;
pub use node::Node;
pub use objects::{Backend, ECHO_PORT, Protocol, Service, ServicePort, WEB_PORT, distribution};
pub use peer::{PlainPod, await_rules, kube_proxy_user};
pub use pod::Pod;
pub use process::{Place, Process, tail};
pub use site::take_down;
pub use traffic::{Client, Ping, failures, names};
