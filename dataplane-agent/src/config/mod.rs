//! The agent's configuration: flags over environment over file over defaults, checked once, here.
//!
//! What comes out of [`Config::load`] is typed and valid; nothing later in the agent checks it again. What only the
//! machine can tell (whether a device exists, where the cgroup file system is) is left to those who use it.

mod file;
mod keys;
mod parse;

use std::{io, net::SocketAddr, ops::RangeInclusive, path::PathBuf, str::FromStr};

use clap::Args;
use http::Uri;
use ipnet::IpNet;

pub use keys::{KEYS, Settings};
pub use parse::Invalid;

use crate::{
    cluster::{Access, FailoverStats},
    datapath::{Capacity, EbpfLog, XdpUse},
    netlink::Uplinks,
    state::{Forwarding, LoadBalancing},
    telemetry::LogFormat,
};

/// Everything an operator can choose.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this node's Node object.
    pub node_name: String,
    pub source: Source,
    /// Directory of the manifests.
    pub manifests: PathBuf,
    /// API servers; empty: the one the credentials name.
    pub api_server: Vec<Uri>,
    /// Credentials for them; `None`: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// What outlives the agent: address leases, and what the cluster last was.
    pub state_dir: PathBuf,
    /// What does not: the agent's socket.
    pub run_dir: PathBuf,
    /// BPF file system that holds the pins.
    pub bpffs: PathBuf,
    /// Cgroup whose sockets are translated at connect; `None`: the root of the cgroup file system.
    pub cgroup: Option<PathBuf>,
    pub uplinks: Uplinks,
    pub xdp: XdpUse,
    pub routing: Routing,
    pub vxlan: Vxlan,
    /// MTU of pods; `None`: follows the uplink and the routing mode.
    pub mtu: Option<u32>,
    pub masquerade: Masquerade,
    pub connect_time: ConnectTime,
    pub services: Services,
    pub node_ports: NodePorts,
    pub cni: Cni,
    pub capacity: Capacity,
    /// Where metrics and health are served; `None`: nowhere.
    pub http: Option<SocketAddr>,
    /// Where kube-proxy's health is answered; `None`: nowhere.
    pub healthz: Option<SocketAddr>,
    /// Where kube-proxy's mode is answered; `None`: nowhere.
    pub proxy_mode: Option<SocketAddr>,
    /// Filter of the log, as `tracing_subscriber::EnvFilter` reads it.
    pub log: String,
    pub log_format: LogFormat,
    pub log_ebpf: EbpfLog,
}

/// Where the objects of the cluster come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// A directory of files.
    #[default]
    Manifests,
    /// The API server.
    Kubernetes,
}

/// How pods of other nodes are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Routing {
    /// Natively where the other node is a neighbour, else through the overlay.
    #[default]
    Auto,
    Native,
    Vxlan,
}

/// The overlay. All nodes of a cluster must agree on `vni` and `port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    pub vni: u32,
    pub port: u16,
    pub device: String,
}

/// Source translation of what pods send out of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masquerade {
    pub enabled: bool,
    /// Destinations that see the pod's own address.
    pub except: Vec<IpNet>,
    /// Ports of the node that belong to masqueraded connections.
    pub ports: RangeInclusive<u16>,
}

/// Which protocols choose a service's backend at `connect()`. What is off is translated per packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectTime {
    pub tcp: bool,
    pub udp: bool,
}

/// What holds for services that do not choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Services {
    pub load_balancing: LoadBalancing,
    pub forwarding: Forwarding,
}

/// Where this node takes node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePorts {
    pub addresses: NodePortAddresses,
    /// Processes of the node find them at its loopback addresses too.
    pub loopback: bool,
}

/// Addresses of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Every one, on whatever device.
    #[default]
    All,
    /// Those it is known by.
    Primary,
    Within(Vec<IpNet>),
}

/// The plugin and its configuration, where the container runtime looks for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cni {
    /// Whether the agent places them.
    pub install: bool,
    pub bin_dir: PathBuf,
    pub conf_dir: PathBuf,
}

/// Whose directories.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CniPreset {
    /// Everybody's, k3s without flannel among them.
    #[default]
    Standard,
    Microk8s,
    /// k3s as long as flannel is not switched off.
    K3s,
}

/// Arguments of `run`: the file, and a flag for each of its keys.
#[derive(Clone, Debug, Default, Args)]
pub struct RunArgs {
    /// Configuration file (YAML); flags and environment variables override it
    #[arg(long, env = "DATAPLANE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read configuration {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {source}")]
    Syntax { path: PathBuf, source: serde_norway::Error },
    #[error("{path}: expected a mapping of keys to values, found {found}")]
    NoMapping { path: PathBuf, found: &'static str },
    #[error("{path}: unknown key {key}: {hint}")]
    UnknownKey { path: PathBuf, key: String, hint: String },
    #[error("{path}: {key}: {value:?}: {reason}")]
    Value { path: PathBuf, key: String, value: String, reason: Invalid },
    #[error("{path}: {key}: {reason}")]
    Form { path: PathBuf, key: String, reason: String },
    #[error("{key}: {reason}")]
    Conflict { key: &'static str, reason: String },
    #[error("node_name: not given, and the host name {name:?} cannot be one: {reason}")]
    HostName { name: String, reason: Invalid },
    #[error("node_name: not given, and the host name cannot be read: {0}")]
    NoHostName(#[source] io::Error),
}

impl Config {
    /// The configuration `args` ask for: each key from its flag, else its variable, else the file, else its default.
    pub fn load(args: &RunArgs) -> Result<Self, ConfigError> {
        let mut settings = args.settings.clone();
        if let Some(path) = &args.config {
            file::fill(&mut settings, path)?;
        }
        let config = Self::from_settings(settings)?;
        config.check()?;
        Ok(config)
    }

    fn from_settings(set: Settings) -> Result<Self, ConfigError> {
        let capacity = Capacity::default();
        let source = set.source.unwrap_or_default();
        let in_cluster = source == Source::Kubernetes;
        let preset = set.cni_preset.unwrap_or_default();
        let port = |chosen: Option<parse::Http>, address: [u8; 4], port: u16| match chosen {
            Some(chosen) => chosen.0,
            None => in_cluster.then(|| SocketAddr::from((address, port))),
        };
        Ok(Self {
            node_name: set.node_name.map_or_else(host_name, Ok)?,
            source,
            manifests: set.manifests.unwrap_or_else(|| "/etc/dataplane/manifests".into()),
            api_server: set.api_server.unwrap_or_default().0,
            kubeconfig: set.kubeconfig.unwrap_or_default().0,
            state_dir: set.state_dir.unwrap_or_else(|| "/var/lib/dataplane".into()),
            run_dir: set.run_dir.unwrap_or_else(|| "/run/dataplane".into()),
            bpffs: set.bpffs.unwrap_or_else(|| "/sys/fs/bpf".into()),
            cgroup: set.cgroup.unwrap_or_default().0,
            uplinks: set.uplinks.unwrap_or_default(),
            xdp: set.xdp.unwrap_or_default(),
            routing: set.routing.unwrap_or_default(),
            vxlan: Vxlan {
                vni: set.vxlan_vni.unwrap_or(1),
                port: set.vxlan_port.unwrap_or(8_472),
                device: set.vxlan_device.unwrap_or_else(|| "dataplane0".to_owned()),
            },
            mtu: set.mtu.unwrap_or_default().0,
            masquerade: Masquerade {
                enabled: set.masquerade_enabled.unwrap_or(true),
                except: set.masquerade_except.unwrap_or_default().0,
                ports: set.masquerade_ports.unwrap_or(61_000..=65_535),
            },
            connect_time: ConnectTime {
                tcp: set.connect_time_tcp.unwrap_or(true),
                udp: set.connect_time_udp.unwrap_or(false),
            },
            services: Services {
                load_balancing: set.services_load_balancing.unwrap_or_default(),
                forwarding: set.services_forwarding.unwrap_or_default(),
            },
            node_ports: NodePorts {
                addresses: set.node_ports_addresses.unwrap_or_default(),
                loopback: set.node_ports_loopback.unwrap_or(true),
            },
            cni: Cni {
                install: set.cni_install.unwrap_or(in_cluster),
                bin_dir: set.cni_bin_dir.unwrap_or_else(|| preset.bin_dir().into()),
                conf_dir: set.cni_conf_dir.unwrap_or_else(|| preset.conf_dir().into()),
            },
            capacity: Capacity {
                endpoints: set.capacity_endpoints.unwrap_or(capacity.endpoints),
                routes: set.capacity_routes.unwrap_or(capacity.routes),
                services: set.capacity_services.unwrap_or(capacity.services),
                backends: set.capacity_backends.unwrap_or(capacity.backends),
                backend_generations: set.capacity_backend_generations.unwrap_or(capacity.backend_generations),
                flows: set.capacity_flows.unwrap_or(capacity.flows),
                fragments: set.capacity_fragments.unwrap_or(capacity.fragments),
                datagram_origins: set.capacity_datagram_origins.unwrap_or(capacity.datagram_origins),
                source_ranges: set.capacity_source_ranges.unwrap_or(capacity.source_ranges),
                affinity: set.capacity_affinity.unwrap_or(capacity.affinity),
                events_bytes: set.capacity_events_bytes.unwrap_or(capacity.events_bytes),
            },
            http: set.http.unwrap_or_default().0,
            healthz: port(set.healthz, [0, 0, 0, 0], 10_256),
            proxy_mode: port(set.proxy_mode, [127, 0, 0, 1], 10_249),
            log: set.log.unwrap_or_else(|| "info".to_owned()),
            log_format: set.log_format.unwrap_or_default(),
            log_ebpf: set.log_ebpf.unwrap_or_default(),
        })
    }

    /// How the cluster is reached.
    pub fn access(&self) -> Access {
        Access {
            servers: self.api_server.clone(),
            kubeconfig: self.kubeconfig.clone(),
            failover_stats: FailoverStats::default(),
        }
    }

    /// What is right alone and wrong together.
    fn check(&self) -> Result<(), ConfigError> {
        let Vxlan { port, device, .. } = &self.vxlan;
        if self.masquerade.enabled && self.masquerade.ports.contains(port) {
            return Err(ConfigError::Conflict {
                key: "masquerade.ports",
                reason: format!(
                    "{}-{} contains vxlan.port {port}: a tunnel and a masqueraded connection would collide",
                    self.masquerade.ports.start(),
                    self.masquerade.ports.end(),
                ),
            });
        }
        if let Uplinks::Named(names) = &self.uplinks
            && names.contains(device)
        {
            return Err(ConfigError::Conflict {
                key: "uplinks",
                reason: format!("{device} is the overlay device (vxlan.device)"),
            });
        }
        Ok(())
    }
}

/// The name kubelet gives a node by default.
fn host_name() -> Result<String, ConfigError> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(ConfigError::NoHostName)?;
    let name = name.trim().to_lowercase();
    parse::node_name(&name).map_err(|reason| ConfigError::HostName { name, reason })
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

#[cfg(test)]
mod tests;
