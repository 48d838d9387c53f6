//! The object types that every source delivers: parsed, validated, reduced to what the datapath
//! needs.

use std::{collections::BTreeMap, fmt, net::IpAddr, time::SystemTime};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Name, Uid};

/// Namespace and name of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NamespacedName {
    pub namespace: Name,
    pub name: Name,
}

/// The incarnation of an object that a row came from. A removal names it, so that it cannot delete
/// the row of a recreated object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// From `metadata.uid`; empty if the manifest has none.
    pub uid: Uid,
}

/// A node of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    pub owner: Owner,
    /// `spec.podCIDRs`: at most one per family.
    pub pod_cidrs: Vec<IpNet>,
    /// `status.addresses` of type InternalIP: next hops and tunnel endpoints, at most one per
    /// family.
    pub internal_ips: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    /// Keys of `spec.taints`.
    pub taints: Vec<String>,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
}

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Namespace {
    pub name: String,
    pub owner: Owner,
    pub labels: BTreeMap<String, String>,
    /// Annotations under `dataplane.local/`.
    pub annotations: BTreeMap<String, String>,
}

/// A pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pod {
    pub name: NamespacedName,
    pub owner: Owner,
    /// `spec.nodeName`.
    pub node: String,
    pub labels: BTreeMap<String, String>,
    /// Annotations under `dataplane.local/`, and the bandwidth annotations.
    pub annotations: BTreeMap<String, String>,
    /// `spec.hostNetwork`: it uses the node's addresses.
    pub host_network: bool,
    /// `status.podIPs`.
    pub ips: Vec<IpAddr>,
    /// The phase is terminal (`Succeeded` or `Failed`).
    pub ended: bool,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
}

/// A ServiceCIDR: ranges from which cluster IPs are allocated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServiceCidr {
    pub name: String,
    pub owner: Owner,
    /// `spec.cidrs`: at most one per family.
    pub cidrs: Vec<IpNet>,
}

/// A Service with cluster IPs. Headless and ExternalName services never become one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Service {
    pub name: NamespacedName,
    pub owner: Owner,
    /// At most one per family. A family without a cluster IP has no frontends.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs` in the families of the cluster IPs.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress` in the families of the cluster IPs, without `ipMode: Proxy`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`: clients allowed at load balancer addresses. Empty: all.
    pub source_ranges: Vec<IpNet>,
    /// `spec.internalTrafficPolicy`, for cluster IPs.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`, for all other frontends.
    pub external_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort`.
    pub health_check_port: Option<u16>,
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP` timeout in seconds.
    pub affinity_timeout: Option<u32>,
    /// `None`: the node's default.
    pub load_balancing: Option<LoadBalancing>,
    /// `None`: the node's default.
    pub forwarding: Option<Forwarding>,
}

/// A port of a service. EndpointSlices refer to it by `name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServicePort {
    /// Empty if the service has a single unnamed port.
    pub name: Name,
    pub port: u16,
    pub protocol: TransportProtocol,
    pub node_port: Option<u16>,
}

/// Which endpoints a frontend uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Endpoints on all nodes.
    #[default]
    Cluster,
    /// Endpoints on the node that receives the connection.
    Local,
}

/// How a backend is selected. Annotation `dataplane.local/load-balancing: random|maglev`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LoadBalancing {
    #[default]
    Random,
    Maglev,
}

/// How an external connection reaches a backend on another node. Annotation
/// `dataplane.local/forwarding-mode: snat|dsr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Forwarding {
    /// Source NAT to the node's address: replies return through this node.
    #[default]
    Snat,
    /// Direct server return: the client address is kept and the backend's node replies to the
    /// client. Requires [`LoadBalancing::Maglev`], so that both nodes select the same backend.
    Dsr,
}

/// Protocol of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TransportProtocol {
    Tcp,
    Udp,
    Sctp,
}

/// Some of the endpoints of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EndpointSlice {
    pub name: NamespacedName,
    pub owner: Owner,
    /// Label `kubernetes.io/service-name`, in the slice's namespace.
    pub service: NamespacedName,
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<Endpoint>,
    /// When the change that caused this version of the slice happened
    /// (`endpoints.kubernetes.io/last-change-trigger-time`).
    pub trigger_time: Option<SystemTime>,
}

/// Target port of a service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EndpointPort {
    /// The service port's name.
    pub name: Name,
    pub port: u16,
    pub protocol: TransportProtocol,
}

/// A pod or host behind a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// The first of `addresses`; the API gives the others no meaning.
    pub address: IpAddr,
    /// Receives new connections. An unset condition counts as ready (KEP-752).
    pub ready: bool,
    /// Accepts traffic, even while terminating (KEP-1672).
    pub serving: bool,
    pub terminating: bool,
    pub node_name: Option<Name>,
    /// `None` for most endpoints; boxed to keep the struct small.
    pub hints: Option<Box<Hints>>,
}

/// Topology hints of an endpoint (KEP-2433, KEP-3015).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Box<[Name]>,
    /// Values of the node label `topology.kubernetes.io/zone`.
    pub zones: Box<[Name]>,
}

/// An object delivered by a source.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Object {
    Node(Node),
    Namespace(Namespace),
    Service(Service),
    EndpointSlice(EndpointSlice),
    Pod(Pod),
    ServiceCidr(ServiceCidr),
}

/// Key of an object in the state.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectKey {
    Node(String),
    Namespace(String),
    Service(NamespacedName),
    EndpointSlice(NamespacedName),
    Pod(NamespacedName),
    ServiceCidr(String),
}

/// An event from a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The object was added or changed.
    Upsert(Object),
    /// The object was deleted. Ignored if the state holds another incarnation (UID).
    Remove(ObjectKey, Owner),
    /// Every existing object was delivered once: objects not in the state may be deleted.
    Synced,
}

impl NamespacedName {
    pub fn new(namespace: impl Into<Name>, name: impl Into<Name>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl Object {
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Node(node) => ObjectKey::Node(node.name.clone()),
            Self::Namespace(namespace) => ObjectKey::Namespace(namespace.name.clone()),
            Self::Service(service) => ObjectKey::Service(service.name.clone()),
            Self::EndpointSlice(slice) => ObjectKey::EndpointSlice(slice.name.clone()),
            Self::Pod(pod) => ObjectKey::Pod(pod.name.clone()),
            Self::ServiceCidr(range) => ObjectKey::ServiceCidr(range.name.clone()),
        }
    }

    pub const fn owner(&self) -> &Owner {
        match self {
            Self::Node(node) => &node.owner,
            Self::Namespace(namespace) => &namespace.owner,
            Self::Service(service) => &service.owner,
            Self::EndpointSlice(slice) => &slice.owner,
            Self::Pod(pod) => &pod.owner,
            Self::ServiceCidr(range) => &range.owner,
        }
    }
}

impl TransportProtocol {
    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for TransportProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "Node {name}"),
            Self::Namespace(name) => write!(f, "Namespace {name}"),
            Self::Service(name) => write!(f, "Service {name}"),
            Self::EndpointSlice(name) => write!(f, "EndpointSlice {name}"),
            Self::Pod(name) => write!(f, "Pod {name}"),
            Self::ServiceCidr(name) => write!(f, "ServiceCIDR {name}"),
        }
    }
}
