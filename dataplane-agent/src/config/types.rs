//! Types of configuration values, and how they are parsed.

use std::{ops::RangeInclusive, path::PathBuf, str::FromStr};

use ipnet::IpNet;

use super::Invalid;
use crate::{
    datapath::XdpUse,
    state::{Forwarding, LoadBalancing},
};

/// Source of cluster objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifest files.
    #[default]
    Manifests,
    /// The API server.
    Kubernetes,
}

/// Routing mode to pods of other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Routing {
    /// Native to nodes on the same link, else through the overlay.
    #[default]
    Auto,
    Native,
    Vxlan,
}

/// Way of packets between pods and machines outside of the cluster, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Egress {
    /// Past the kernel's stack, where the kernel's route allows.
    #[default]
    Direct,
    /// Through the kernel's stack and its firewall.
    Stack,
}

/// The VXLAN overlay. `vni` and `port` must be the same on all nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    pub vni: u32,
    pub port: u16,
    pub device: String,
}

/// Source NAT of packets from pods to destinations outside of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masquerade {
    pub enabled: bool,
    /// Destinations without masquerading.
    pub except: Vec<IpNet>,
    /// Source ports of masqueraded connections.
    pub ports: RangeInclusive<u16>,
}

/// Protocols whose backend is chosen at `connect()`. Others are translated per packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectTime {
    pub tcp: bool,
    pub udp: bool,
}

/// Settings of services: defaults without the corresponding annotation, and pings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Services {
    pub load_balancing: LoadBalancing,
    pub forwarding: Forwarding,
    /// Pings to the addresses of Services are answered.
    pub ping: bool,
}

/// Node port settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePorts {
    pub addresses: NodePortAddresses,
    /// Node ports are served at loopback addresses, too.
    pub loopback: bool,
}

/// Addresses of the node that accept node ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// All addresses of all devices.
    #[default]
    All,
    /// The InternalIPs of the Node.
    Primary,
    /// Addresses within these CIDRs.
    Within(Vec<IpNet>),
}

/// Installation of the CNI plugin and its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cni {
    /// The agent installs them.
    pub install: bool,
    pub bin_dir: PathBuf,
    pub conf_dir: PathBuf,
}

/// Directories of a Kubernetes distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CniPreset {
    /// Most distributions, including k3s without flannel.
    #[default]
    Standard,
    Microk8s,
    /// k3s with flannel.
    K3s,
}

impl Source {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Manifests => "manifests",
            Self::Kubernetes => "kubernetes",
        }
    }
}

impl FromStr for Source {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "manifests" => Ok(Self::Manifests),
            "kubernetes" => Ok(Self::Kubernetes),
            _ => Err(Invalid::new("must be manifests or kubernetes")),
        }
    }
}

impl CniPreset {
    pub const fn bin_dir(self) -> &'static str {
        match self {
            Self::Standard => "/opt/cni/bin",
            Self::Microk8s => "/var/snap/microk8s/current/opt/cni/bin",
            Self::K3s => "/var/lib/rancher/k3s/data/cni",
        }
    }

    pub const fn conf_dir(self) -> &'static str {
        match self {
            Self::Standard => "/etc/cni/net.d",
            Self::Microk8s => "/var/snap/microk8s/current/args/cni-network",
            Self::K3s => "/var/lib/rancher/k3s/agent/etc/cni/net.d",
        }
    }
}

impl FromStr for CniPreset {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "standard" => Ok(Self::Standard),
            "microk8s" => Ok(Self::Microk8s),
            "k3s" => Ok(Self::K3s),
            _ => Err(Invalid::new("must be standard, microk8s or k3s")),
        }
    }
}

impl FromStr for LoadBalancing {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "random" => Ok(Self::Random),
            "maglev" => Ok(Self::Maglev),
            _ => Err(Invalid::new("must be random or maglev")),
        }
    }
}

impl FromStr for Forwarding {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "snat" => Ok(Self::Snat),
            "dsr" => Ok(Self::Dsr),
            _ => Err(Invalid::new("must be snat or dsr")),
        }
    }
}

impl FromStr for XdpUse {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "off" => Ok(Self::Off),
            "native" => Ok(Self::Native),
            _ => Err(Invalid::new("must be off or native")),
        }
    }
}

impl FromStr for Egress {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "direct" => Ok(Self::Direct),
            "stack" => Ok(Self::Stack),
            _ => Err(Invalid::new("must be direct or stack")),
        }
    }
}

impl FromStr for Routing {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "auto" => Ok(Self::Auto),
            "native" => Ok(Self::Native),
            "vxlan" => Ok(Self::Vxlan),
            _ => Err(Invalid::new("must be auto, native or vxlan")),
        }
    }
}
