//! The views `services`, `endpoints` and `routes`: what the tables say about cluster objects.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView {
    pub namespace: String,
    pub name: String,
    /// Empty if the port has no name.
    pub port_name: String,
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<IpAddr>,
    /// Every address and port of it, cluster IPs included.
    #[serde(default)]
    pub frontends: Vec<FrontendView>,
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `dataplane_common::abi::Service::id`.
    pub id: u32,
    /// The highest generation of its frontends.
    pub generation: u32,
    /// `random` or `maglev`.
    pub load_balancing: String,
    /// Forwarding of external clients to backends on other nodes: `snat` or `dsr`.
    #[serde(default)]
    pub forwarding: String,
    /// Session affinity timeout; absent without session affinity.
    #[serde(rename = "sessionAffinityTimeoutSeconds")]
    pub affinity_timeout: Option<u32>,
    /// Backends for new connections, of both families.
    pub backends: Vec<BackendView>,
}

/// An address and port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendView {
    pub kind: FrontendKind,
    /// Of a node port: the unspecified address of its family, for every address of the node that
    /// accepts node ports.
    pub address: IpAddr,
    pub port: u16,
    /// The clients this frontend is for.
    pub clients: ClientsView,
    /// Traffic policy Local: only backends on this node, and the client's address is kept.
    pub local_only: bool,
    /// Only clients in `loadBalancerSourceRanges` are accepted.
    pub has_source_ranges: bool,
    /// Number of backends.
    pub backends: u32,
}

/// The field that a frontend comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// `spec.externalIPs`.
    #[serde(rename = "ExternalIP")]
    ExternalIp,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.ports[].nodePort`.
    NodePort,
    /// A pod's `hostPort`.
    HostPort,
}

/// The clients of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ClientsView {
    /// All clients.
    All,
    /// Pods and processes of this node, where [`Self::External`] clients get other backends.
    Internal,
    /// All other clients.
    External,
}

/// A backend of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BackendView {
    pub address: IpAddr,
    pub port: u16,
}

/// An address of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointView {
    pub address: IpAddr,
    /// The pod it belongs to; absent for an address of the host.
    pub pod: Option<PodView>,
    /// Name of the pod's host-side device.
    pub device: Option<String>,
    pub ifindex: u32,
    /// MAC address inside the pod.
    pub mac: Option<String>,
    /// Protocols whose replies to this address may need reverse translation: `tcp`, `udp`, `icmp`,
    /// `other`.
    pub flow_hints: Vec<String>,
    /// An address of the host that accepts node ports.
    #[serde(default)]
    pub accepts_node_ports: bool,
    /// The pod's device is down: packets to it are dropped.
    #[serde(default)]
    pub device_down: bool,
}

/// Name of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodView {
    pub namespace: String,
    pub name: String,
}

/// A row of the route table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteView {
    pub prefix: IpNet,
    pub kind: RouteKindView,
    pub next_hop: Option<IpAddr>,
    pub device: Option<String>,
    /// Node that the prefix belongs to.
    pub node: Option<String>,
    /// Bytes; 0 if unknown.
    pub mtu: u32,
}

/// Treatment of packets to the prefix (`dataplane_common::abi::RouteKind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RouteKindView {
    Native,
    Overlay,
    NoMasquerade,
    Local,
    Services,
}
