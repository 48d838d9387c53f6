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

impl Egress {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Stack => "stack",
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

/// Reads the values of an enum by their names in the file; anything else is an error with this
/// text.
macro_rules! named_values {
    ($($type:ident { $($name:literal => $value:ident),+ } $must:literal;)+) => {$(
        impl FromStr for $type {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                match text {
                    $($name => Ok(Self::$value),)+
                    _ => Err(Invalid::new($must)),
                }
            }
        }
    )+};
}

named_values! {
    Source { "manifests" => Manifests, "kubernetes" => Kubernetes } "must be manifests or kubernetes";
    CniPreset { "standard" => Standard, "microk8s" => Microk8s, "k3s" => K3s } "must be standard, microk8s or k3s";
    LoadBalancing { "random" => Random, "maglev" => Maglev } "must be random or maglev";
    Forwarding { "snat" => Snat, "dsr" => Dsr } "must be snat or dsr";
    XdpUse { "off" => Off, "native" => Native } "must be off or native";
    Egress { "direct" => Direct, "stack" => Stack } "must be direct or stack";
    Routing { "auto" => Auto, "native" => Native, "vxlan" => Vxlan } "must be auto, native or vxlan";
}
