//! Clusters of network namespaces on one machine: nodes with the real agent, pods created by the
//! real CNI plugin, real traffic. Tests, demo and benchmark use it.

mod agent;
mod checks;
mod cluster;
mod cni;
mod diagnostics;
mod fabric;
mod family;
pub mod interrupt;
mod kube_proxy;
mod losses;
mod netns;
mod node;
mod objects;
mod pinned;
mod pod;
mod process;
mod publisher;
mod resources;
mod traffic;
mod tuntap;
pub mod wait;
mod xdp_ports;

pub use agent::Agent;
pub use checks::Checks;
pub use cluster::{Cluster, Routing, Spec, attach_to_pod, service_addresses};
pub use fabric::{Fabric, OUTSIDE_V4, OUTSIDE_V6, Segment, outside};
pub use family::Family;
pub use interrupt::{at_exit, is_interrupted};
pub use kube_proxy::{PlainPod, await_rules, kube_proxy_user};
pub use netns::Namespace;
pub use node::Node;
pub use objects::{Backend, ECHO_PORT, Protocol, Service, ServicePort, WEB_PORT, distribution};
pub use pod::Pod;
pub use process::{Place, Process, tail};
pub use publisher::{Control, Source, agent_user};
pub use resources::take_down;
pub use traffic::{Client, Ping, failures, names};
pub use tuntap::{Layer, TunTap};
