//! What plugin and agent say to each other: one JSON object per line, request then response.
//!
//! Free of CNI versions: the plugin translates. Fields may be added, and an unknown one is ignored, because plugin and
//! agent of different versions meet during an upgrade.

use std::{fmt, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Where the agent listens unless the network configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/dataplane/agent.sock";

/// Codes of failures that are ours (the CNI leaves 100 and above to plugins), and those of the CNI the agent uses.
pub mod code {
    /// CNI: the container is not known; there is nothing to clean up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// CNI: an environment variable does not lead where it should.
    pub const ENVIRONMENT: u32 = 4;
    /// CNI: reading or writing failed.
    pub const IO: u32 = 5;
    /// CNI: not understood.
    pub const DECODE: u32 = 6;
    /// CNI: not now, but later.
    pub const TRY_AGAIN: u32 = 11;
    /// CNI, STATUS: pods cannot be added.
    pub const NOT_AVAILABLE: u32 = 50;
    /// CNI, STATUS: nor can those that are there be relied on.
    pub const LIMITED: u32 = 51;
    /// A pod range of this node has no free address.
    pub const RANGE_EXHAUSTED: u32 = 100;
    /// A device, address, route or neighbour of the pod could not be made or removed.
    pub const DEVICE: u32 = 101;
    /// The record of the pod could not be written or removed.
    pub const RECORD: u32 = 102;
    /// The datapath did not take or release the pod.
    pub const DATAPATH: u32 = 103;
    /// CHECK found the pod's network not to be as it was made.
    pub const CHECK: u32 = 104;
    /// A port of the node that the pod asks for is another pod's.
    pub const PORT_TAKEN: u32 = 105;
    /// The pod asks for an address it cannot have.
    pub const ADDRESS: u32 = 106;
}

/// A question to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// Answered by [`Response::Added`].
    Add(Add),
    /// This and the rest are answered by [`Response::Done`]; all may be answered by [`Response::Failed`].
    Del(Del),
    Check(Check),
    Gc(Gc),
    Status,
}

/// Names a device in a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    pub container_id: String,
    pub ifname: String,
}

/// Gives a container a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Add {
    pub attachment: Attachment,
    /// Name of the network configuration.
    pub network: String,
    /// File of the container's network namespace.
    pub netns: PathBuf,
    /// Absent outside of Kubernetes.
    pub pod: Option<Pod>,
    /// Ports of the node that lead to the container (capability `portMappings`).
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    /// How fast the container may talk (capability `bandwidth`).
    #[serde(default)]
    pub bandwidth: Bandwidth,
}

/// Limits of a container's traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// To the container; `None`: as fast as it can.
    #[serde(default)]
    pub ingress: Option<Limit>,
    /// From it.
    #[serde(default)]
    pub egress: Option<Limit>,
}

/// A limit of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Bits per second, never 0.
    pub rate: u64,
    /// Bits that may go at once; `None`: what fits the rate.
    #[serde(default)]
    pub burst: Option<u64>,
}

/// A port of the node that leads to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Address of the node; `None`: every one.
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

/// Takes the device away. Neither it nor the namespace need exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Del {
    pub attachment: Attachment,
}

/// Asks whether everything is as [`Add`] left it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub attachment: Attachment,
    pub netns: PathBuf,
    /// What the runtime remembers of the answer to [`Add`].
    pub addresses: Vec<IpAddr>,
    /// Link address inside the pod, as the runtime remembers it.
    pub mac: Option<String>,
}

/// Takes away the devices of a network that are not listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gc {
    pub network: String,
    pub valid: Vec<Attachment>,
}

/// A pod, as Kubernetes names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    /// Empty if the runtime does not tell.
    #[serde(default)]
    pub uid: String,
}

/// The agent's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Response {
    Added(Added),
    Done,
    Failed(Failure),
}

/// The device a container has got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// Name of the host's side.
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

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A number of [`code`].
    pub code: u32,
    /// A sentence.
    pub message: String,
    /// More of it, if there is more to say.
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
    /// Whether a packet can be addressed to both.
    pub fn collides(&self, other: &Self) -> bool {
        let everywhere = self.host_ip.is_none() || other.host_ip.is_none();
        self.host_port == other.host_port
            && self.protocol == other.protocol
            && (everywhere || self.host_ip == other.host_ip)
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
    /// Its name in logs and metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Add(_) => "add",
            Self::Del(_) => "del",
            Self::Check(_) => "check",
            Self::Gc(_) => "gc",
            Self::Status => "status",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_told_by_its_verb_and_never_looks_like_a_view() {
        let attachment = Attachment { container_id: "c1".to_owned(), ifname: "eth0".to_owned() };
        let line = serde_json::to_value(Request::Del(Del { attachment })).unwrap();
        assert_eq!(line["verb"], "del");
        // the agent's socket serves the CLI too, whose requests name a view
        assert!(line.get("view").is_none());
        assert_eq!(serde_json::to_string(&Request::Status).unwrap(), r#"{"verb":"status"}"#);
    }

    #[test]
    fn what_a_newer_peer_adds_is_ignored() {
        let line = r#"{"verb":"del","attachment":{"container_id":"c","ifname":"e","more":1},"more":2}"#;
        assert!(matches!(serde_json::from_str(line).unwrap(), Request::Del(_)));
    }
}
