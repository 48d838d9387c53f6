//! The agent's configuration. Precedence: flags, environment variables, file, defaults.
//!
//! [`Config::load`] returns typed and valid values; they are not checked again. Checks that need
//! the machine (whether a device exists, where the cgroup file system is) are left to the users of
//! the values.

mod file;
mod keys;
mod parse;
mod types;

use std::{collections::BTreeMap, io, net::SocketAddr, path::PathBuf};

use clap::Args;
use http::Uri;

pub use keys::{KEYS, Settings};
pub use parse::Invalid;
pub use types::{
    Cni, CniPreset, ConnectTime, Egress, Masquerade, NodePortAddresses, NodePorts, Routing, Services, Source,
    Vxlan,
};

use crate::{
    cluster::{Access, FailoverStats},
    datapath::{Capacity, EbpfLog, XdpUse},
    netlink::DevicePatterns,
    telemetry::LogFormat,
};

/// The only bit of a packet mark that no known software uses; docs/config.md lists them.
const DEFAULT_MARK: u32 = 0x1000;

/// The configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this node's Node object.
    pub node_name: String,
    pub source: Source,
    /// Directory of manifests.
    pub manifests: PathBuf,
    /// API servers; empty: the one in the kubeconfig.
    pub api_server: Vec<Uri>,
    /// Credentials for the API servers; `None`: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Directory of persistent state: pod address leases, and the cached cluster state.
    pub state_dir: PathBuf,
    /// Directory of the API socket.
    pub run_dir: PathBuf,
    /// BPF file system that holds the pins.
    pub bpffs: PathBuf,
    /// Cgroup whose sockets are translated at `connect()`; `None`: the root cgroup.
    pub cgroup: Option<PathBuf>,
    /// Devices that carry the node's traffic.
    pub uplinks: DevicePatterns,
    pub xdp: XdpUse,
    pub routing: Routing,
    pub vxlan: Vxlan,
    /// MTU of pods; `None`: derived from the uplinks and the routing mode.
    pub mtu: Option<u32>,
    /// Bits of `skb->mark` that handled packets carry; not 0.
    pub mark: u32,
    pub egress: Egress,
    pub masquerade: Masquerade,
    pub connect_time: ConnectTime,
    pub services: Services,
    pub node_ports: NodePorts,
    /// Namespaces whose pods may have the annotation `dataplane.local/allowed-sources`.
    pub allowed_sources_namespaces: Vec<String>,
    pub cni: Cni,
    pub capacity: Capacity,
    /// Address of `/metrics`, `/healthz` and `/readyz`; `None`: off.
    pub http_bind_address: Option<SocketAddr>,
    /// Address of kube-proxy's `/healthz` and `/livez`; `None`: off.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Address of kube-proxy's `/proxyMode`; `None`: off.
    pub proxy_mode_bind_address: Option<SocketAddr>,
    /// Log filter in the syntax of `tracing_subscriber::EnvFilter`.
    pub log: String,
    pub log_format: LogFormat,
    pub log_ebpf: EbpfLog,
    /// What the file says, by key, without what a flag or variable overrides.
    pub file_values: BTreeMap<String, String>,
}

/// Arguments of `run`: the configuration file, and a flag for each key.
#[derive(Clone, Debug, Default, Args)]
pub struct RunArgs {
    /// Configuration file (YAML); flags and environment variables override it
    #[arg(long, env = "DATAPLANE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
}

/// Error in the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read configuration {path}: {source}")]
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
    #[error("node_name is not set, and the host name {name:?} is not a valid Node name: {reason}")]
    HostName { name: String, reason: Invalid },
    #[error("node_name is not set, and the host name cannot be read: {0}")]
    NoHostName(#[source] io::Error),
}

impl Config {
    /// Loads the configuration: each key from its flag, else its environment variable, else the
    /// file, else its default.
    pub fn load(args: &RunArgs) -> Result<Self, ConfigError> {
        let mut settings = args.settings.clone();
        let mut file_values = BTreeMap::new();
        if let Some(path) = &args.config {
            file_values = file::fill(&mut settings, path)?;
        }
        let config = Self { file_values, ..Self::from_settings(settings)? };
        config.check()?;
        Ok(config)
    }

    fn from_settings(set: Settings) -> Result<Self, ConfigError> {
        let capacity = Capacity::of_node();
        let source = set.source.unwrap_or_default();
        let in_cluster = source == Source::Kubernetes;
        let preset = set.cni_preset.unwrap_or_default();
        let kube_proxy_port = |set: Option<parse::Http>, address: [u8; 4], port: u16| match set {
            Some(set) => set.0,
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
            mark: set.mark.unwrap_or(DEFAULT_MARK),
            egress: set.egress.unwrap_or_default(),
            masquerade: Masquerade {
                enabled: set.masquerade_enabled.unwrap_or(true),
                except: set.masquerade_except.unwrap_or_default().0,
                ports: set.masquerade_ports.unwrap_or(10_000..=29_999),
            },
            connect_time: ConnectTime {
                tcp: set.connect_time_tcp.unwrap_or(true),
                udp: set.connect_time_udp.unwrap_or(false),
            },
            services: Services {
                load_balancing: set.services_load_balancing.unwrap_or_default(),
                forwarding: set.services_forwarding.unwrap_or_default(),
                ping: set.services_ping.unwrap_or(true),
            },
            node_ports: NodePorts {
                addresses: set.node_ports_addresses.unwrap_or_default(),
                loopback: set.node_ports_loopback.unwrap_or(true),
            },
            allowed_sources_namespaces: set.allowed_sources_namespaces.unwrap_or_default().0,
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
            http_bind_address: set.http_bind_address.unwrap_or_default().0,
            healthz_bind_address: kube_proxy_port(set.healthz_bind_address, [0, 0, 0, 0], 10_256),
            proxy_mode_bind_address: kube_proxy_port(set.proxy_mode_bind_address, [127, 0, 0, 1], 10_249),
            log: set.log.unwrap_or_else(|| "info".to_owned()),
            log_format: set.log_format.unwrap_or_default(),
            log_ebpf: set.log_ebpf.unwrap_or_default(),
            file_values: BTreeMap::new(),
        })
    }

    /// Settings of the API server client.
    pub fn access(&self) -> Access {
        Access {
            servers: self.api_server.clone(),
            kubeconfig: self.kubeconfig.clone(),
            failover_stats: FailoverStats::default(),
        }
    }

    /// Checks that involve more than one key.
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
        if self.uplinks.names().any(|name| name == device) {
            return Err(ConfigError::Conflict {
                key: "uplinks",
                reason: format!("{device} is the overlay device (vxlan.device)"),
            });
        }
        Ok(())
    }
}

/// The host name in lower case: kubelet's default for the Node name.
fn host_name() -> Result<String, ConfigError> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(ConfigError::NoHostName)?;
    let name = name.trim().to_lowercase();
    parse::node_name(&name).map_err(|reason| ConfigError::HostName { name, reason })
}

#[cfg(test)]
mod tests;
