//! The objects, as every source delivers them: parsed, validated, trimmed to what the datapath needs.

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

/// Which incarnation of an object a row came from: a row is deleted only by its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// Of `metadata.uid`; empty when the manifest has none.
    pub uid: Uid,
}

/// A node of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    pub owner: Owner,
    /// `spec.podCIDRs`: at most one per family.
    pub pod_cidrs: Vec<IpNet>,
    /// `status.addresses` of type InternalIP: next hops and tunnel ends, at most one per family.
    pub internal_ips: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    /// Keys of `spec.taints`.
    pub taints: Vec<String>,
    /// Its deletion has begun.
    pub deleting: bool,
}

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Namespace {
    pub name: String,
    pub owner: Owner,
    pub labels: BTreeMap<String, String>,
    /// Those under `dataplane.local/`.
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
    /// Those under `dataplane.local/`, and those of the bandwidth.
    pub annotations: BTreeMap<String, String>,
    /// It has the node's addresses, not its own.
    pub host_network: bool,
    /// `status.podIPs`.
    pub ips: Vec<IpAddr>,
    /// Its containers have ended for good (`Succeeded`, `Failed`).
    pub ended: bool,
    /// Its deletion has begun.
    pub deleting: bool,
}

/// A range of cluster IPs.
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
    /// At most one per family; only their families are served.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`, of its families.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress`, of its families, those of `ipMode: Proxy` left out.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`: who may ask at the addresses of the load balancer. Empty: everyone.
    pub source_ranges: Vec<IpNet>,
    /// `spec.internalTrafficPolicy`: of the cluster IPs.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`: of every other frontend.
    pub external_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort`.
    pub health_check_port: Option<u16>,
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP` timeout in seconds.
    pub affinity_timeout: Option<u32>,
    /// `None`: as the node has it.
    pub load_balancing: Option<LoadBalancing>,
    /// `None`: as the node has it.
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

/// Which endpoints a frontend leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Those of all nodes.
    #[default]
    Cluster,
    /// Those of the node that is asked.
    Local,
}

/// How a backend is chosen. Annotation `dataplane.local/load-balancing: random|maglev`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LoadBalancing {
    #[default]
    Random,
    Maglev,
}

/// How a client from outside gets to a backend on another node than the one it asks. Annotation
/// `dataplane.local/forwarding-mode: snat|dsr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Forwarding {
    /// Under the node's address: the answer comes back by here.
    #[default]
    Snat,
    /// As it came: the other node answers (direct server return). Takes [`LoadBalancing::Maglev`], by which both nodes
    /// choose the same backend.
    Dsr,
}

/// Protocols a service port can have.
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
    /// When the change happened that led to this state of the slice
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
    /// The first of `addresses`: the others mean nothing.
    pub address: IpAddr,
    /// Gets new connections. Unset conditions count as ready (KEP-752).
    pub ready: bool,
    /// Answers, though it may be terminating (KEP-1672).
    pub serving: bool,
    pub terminating: bool,
    pub node_name: Option<Name>,
    /// Most have none.
    pub hints: Option<Box<Hints>>,
}

/// For whom an endpoint is meant, where it matters (KEP-2433, KEP-3015).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Box<[Name]>,
    /// Values of the node label `topology.kubernetes.io/zone`.
    pub zones: Box<[Name]>,
}

/// An object a source delivered.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Object {
    Node(Node),
    Namespace(Namespace),
    Service(Service),
    EndpointSlice(EndpointSlice),
    Pod(Pod),
    ServiceCidr(ServiceCidr),
}

/// Names an object of the state.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectKey {
    Node(String),
    Namespace(String),
    Service(NamespacedName),
    EndpointSlice(NamespacedName),
    Pod(NamespacedName),
    ServiceCidr(String),
}

/// What a source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The object is there, as given.
    Upsert(Object),
    /// The object is gone. Not believed if its owner (UID) is not the one that is gone.
    Remove(ObjectKey, Owner),
    /// Everything that exists has been delivered once: from now on, what is not in the state may be deleted.
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
