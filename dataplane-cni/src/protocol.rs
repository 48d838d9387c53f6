//! The protocol between plugin and agent: one JSON object per line, request then response.
//!
//! Independent of the CNI version, which only the plugin knows. Fields may be added, and unknown
//! fields are ignored, because plugin and agent may be of different versions during an upgrade.

use std::{fmt, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Default of `agentSocket` in the network configuration: the socket the agent listens on.
pub const DEFAULT_SOCKET: &str = "/run/dataplane/agent.sock";

/// Error codes: those of the CNI specification that the agent uses, and our own (100 and above are
/// for plugins).
pub mod code {
    /// CNI: unknown container; nothing to clean up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// CNI: invalid environment variable.
    pub const ENVIRONMENT: u32 = 4;
    /// CNI: I/O failure.
    pub const IO: u32 = 5;
    /// CNI: failed to decode content.
    pub const DECODE: u32 = 6;
    /// CNI: try again later.
    pub const TRY_AGAIN: u32 = 11;
    /// CNI, STATUS: ADD is not available.
    pub const NOT_AVAILABLE: u32 = 50;
    /// CNI, STATUS: ADD is not available, and existing pods may have limited connectivity.
    pub const LIMITED: u32 = 51;
    /// A pod range of this node has no free address.
    pub const RANGE_EXHAUSTED: u32 = 100;
    /// A device, address, route or neighbour of the pod could not be created or removed.
    pub const DEVICE: u32 = 101;
    /// The record of the pod could not be written or removed.
    pub const RECORD: u32 = 102;
    /// The pod could not be attached to or detached from the datapath.
    pub const DATAPATH: u32 = 103;
    /// CHECK found differences from what ADD created.
    pub const CHECK: u32 = 104;
    /// A requested host port is in use by another pod.
    pub const PORT_TAKEN: u32 = 105;
    /// The requested address of the pod is not available.
    pub const ADDRESS: u32 = 106;
}

/// A request to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// The response is [`Response::Added`].
    Add(Add),
    /// The response to this and the following is [`Response::Done`]. Any request can get
    /// [`Response::Failed`].
    Del(Del),
    Check(Check),
    Gc(Gc),
    Status,
}

/// A network interface of a container: CNI's term for what ADD creates.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    pub container_id: String,
    pub ifname: String,
}

/// ADD: creates a container's interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Add {
    pub attachment: Attachment,
    /// Name of the network configuration.
    pub network: String,
    /// Path of the container's network namespace.
    pub netns: PathBuf,
    /// `None` outside of Kubernetes.
    pub pod: Option<Pod>,
    /// Host ports of the container (capability `portMappings`).
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    /// Rate limits of the container (capability `bandwidth`).
    #[serde(default)]
    pub bandwidth: Bandwidth,
}

/// Rate limits of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Limit of the traffic to the container; `None`: no limit.
    #[serde(default)]
    pub ingress: Option<Limit>,
    /// Limit of the traffic from the container; `None`: no limit.
    #[serde(default)]
    pub egress: Option<Limit>,
}

/// The rate limit of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Bits per second, never 0.
    pub rate: u64,
    /// Bits of a burst; `None`: a default that fits the rate.
    #[serde(default)]
    pub burst: Option<u64>,
}

/// A host port of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Address of the node; `None`: all addresses.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub protocol: PortProtocol,
    pub container_port: u16,
}

/// Protocol of a mapped port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortProtocol {
    Tcp,
    Udp,
    Sctp,
}

/// DEL: removes the interface. Neither it nor the namespace need exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Del {
    pub attachment: Attachment,
}

/// CHECK: verifies that everything is as [`Add`] left it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub attachment: Attachment,
    pub netns: PathBuf,
    /// Addresses in the runtime's `prevResult`.
    pub addresses: Vec<IpAddr>,
    /// MAC address of the interface in `prevResult`.
    pub mac: Option<String>,
}

/// GC: removes the interfaces of a network that are not listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gc {
    pub network: String,
    pub valid: Vec<Attachment>,
}

/// A pod of Kubernetes, from `CNI_ARGS`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    /// Empty if the runtime does not set it.
    #[serde(default)]
    pub uid: String,
}

/// The agent's response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Response {
    Added(Added),
    Done,
    Failed(Failure),
}

/// The interface that ADD created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// Name of the host device.
    pub host_device: String,
    pub host_mac: String,
    pub pod_mac: String,
    pub mtu: u32,
    pub addresses: Vec<PodAddress>,
}

/// An address of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodAddress {
    pub address: IpNet,
    /// Next hop of the default route of its family.
    pub gateway: IpAddr,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A number of [`mod@code`].
    pub code: u32,
    /// What failed, on which object, and why.
    pub message: String,
    /// What the operator can do; may be empty.
    #[serde(default)]
    pub details: String,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of container {}", self.ifname, self.container_id)
    }
}

impl fmt::Display for PortProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

impl PortMapping {
    /// Whether a packet can match both.
    pub fn collides(&self, other: &Self) -> bool {
        let any_address = self.host_ip.is_none() || other.host_ip.is_none();
        self.host_port == other.host_port
            && self.protocol == other.protocol
            && (any_address || self.host_ip == other.host_ip)
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(ip) => write!(f, "{}/{} on {ip}", self.host_port, self.protocol),
            None => write!(f, "{}/{}", self.host_port, self.protocol),
        }
    }
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Request {
    /// The command's name in logs and metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Add(_) => "add",
            Self::Del(_) => "del",
            Self::Check(_) => "check",
            Self::Gc(_) => "gc",
            Self::Status => "status",
        }
    }

    /// What the request is about, for logs: pod and interface, or network.
    pub fn object(&self) -> String {
        match self {
            Self::Add(Add { attachment, pod: Some(pod), .. }) => format!("pod {pod} ({attachment})"),
            Self::Add(Add { attachment, .. })
            | Self::Del(Del { attachment })
            | Self::Check(Check { attachment, .. }) => attachment.to_string(),
            Self::Gc(Gc { network, .. }) => format!("network {network}"),
            Self::Status => "node".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_has_a_verb_and_no_view() {
        let attachment = Attachment { container_id: "c1".to_owned(), ifname: "eth0".to_owned() };
        let line = serde_json::to_value(Request::Del(Del { attachment })).unwrap();
        assert_eq!(line["verb"], "del");
        // the agent's socket also serves the CLI, whose requests have a view
        assert!(line.get("view").is_none());
        assert_eq!(serde_json::to_string(&Request::Status).unwrap(), r#"{"verb":"status"}"#);
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let line = r#"{"verb":"del","attachment":{"container_id":"c","ifname":"e","more":1},"more":2}"#;
        assert!(matches!(serde_json::from_str(line).unwrap(), Request::Del(_)));
    }
}
