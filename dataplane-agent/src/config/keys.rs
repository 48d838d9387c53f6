//! The configuration keys: each has a flag, an environment variable and a key in the file.
//!
//! `vxlan.vni` in the file is `--vxlan-vni` and `DATAPLANE_VXLAN_VNI`; a test checks that the names
//! correspond.

use std::{ops::RangeInclusive, path::PathBuf};

use clap::Args;

use super::{
    CniPreset, Egress, NodePortAddresses, Routing, Source,
    parse::{self, CgroupPath, Cidrs, Http, Invalid, KubeconfigPath, Mtu, Namespaces, Servers},
};
use crate::{
    datapath::{EbpfLog, XdpUse},
    netlink::DevicePatterns,
    state::{Forwarding, LoadBalancing},
    telemetry::LogFormat,
};

/// Every key of the file; a dot separates section and key.
pub const KEYS: [&str; 50] = [
    "node_name",
    "source",
    "manifests",
    "api_server",
    "kubeconfig",
    "state_dir",
    "run_dir",
    "bpffs",
    "cgroup",
    "uplinks",
    "xdp",
    "routing",
    "vxlan.vni",
    "vxlan.port",
    "vxlan.device",
    "mtu",
    "mark",
    "egress",
    "masquerade.enabled",
    "masquerade.except",
    "masquerade.ports",
    "connect_time.tcp",
    "connect_time.udp",
    "services.load_balancing",
    "services.forwarding",
    "services.ping",
    "node_ports.addresses",
    "node_ports.loopback",
    "allowed_sources_namespaces",
    "cni.install",
    "cni.preset",
    "cni.bin_dir",
    "cni.conf_dir",
    "capacity.endpoints",
    "capacity.routes",
    "capacity.services",
    "capacity.backends",
    "capacity.backend_generations",
    "capacity.flows",
    "capacity.fragments",
    "capacity.datagram_origins",
    "capacity.source_ranges",
    "capacity.affinity",
    "capacity.events_bytes",
    "http_bind_address",
    "healthz_bind_address",
    "proxy_mode_bind_address",
    "log",
    "log_format",
    "log_ebpf",
];

/// Values that were set; `None`: not set.
#[derive(Clone, Debug, Default, Args)]
pub struct Settings {
    /// Name of this node's Node object [default: the host name in lower case]
    #[arg(long, env = "DATAPLANE_NODE_NAME", value_name = "NAME", value_parser = parse::node_name)]
    pub node_name: Option<String>,
    /// Source of cluster objects: manifests (a directory) or kubernetes (the API server) [default:
    /// manifests]
    #[arg(long, env = "DATAPLANE_SOURCE", value_name = "SOURCE", value_parser = parse::from_str::<Source>)]
    pub source: Option<Source>,
    /// Directory of Kubernetes manifests in YAML or JSON [default: /etc/dataplane/manifests]
    #[arg(long, env = "DATAPLANE_MANIFESTS", value_name = "DIR", value_parser = parse::path)]
    pub manifests: Option<PathBuf>,
    /// URLs of the API servers, tried in turn [default: the server of the kubeconfig]
    #[arg(long, env = "DATAPLANE_API_SERVER", value_name = "URL,..", value_parser = parse::servers)]
    pub api_server: Option<Servers>,
    /// Kubeconfig file, or auto for the pod's service account [default: auto]
    #[arg(long, env = "DATAPLANE_KUBECONFIG", value_name = "FILE", value_parser = parse::kubeconfig)]
    pub kubeconfig: Option<KubeconfigPath>,
    /// Directory of persistent state: pod address leases and the cached cluster state [default:
    /// /var/lib/dataplane]
    #[arg(long, env = "DATAPLANE_STATE_DIR", value_name = "DIR", value_parser = parse::path)]
    pub state_dir: Option<PathBuf>,
    /// Directory of the API socket [default: /run/dataplane]
    #[arg(long, env = "DATAPLANE_RUN_DIR", value_name = "DIR", value_parser = parse::path)]
    pub run_dir: Option<PathBuf>,
    /// Mount point of the BPF file system [default: /sys/fs/bpf]
    #[arg(long, env = "DATAPLANE_BPFFS", value_name = "DIR", value_parser = parse::path)]
    pub bpffs: Option<PathBuf>,
    /// Cgroup whose sockets are translated at connect time, or auto for the root cgroup [default:
    /// auto]
    #[arg(long, env = "DATAPLANE_CGROUP", value_name = "DIR", value_parser = parse::cgroup)]
    pub cgroup: Option<CgroupPath>,
    /// Network devices that carry the node's traffic: auto, names, names with *, and !NAME for
    /// exceptions [default: auto]
    #[arg(long, env = "DATAPLANE_UPLINKS", value_name = "DEVICE,..", value_parser = parse::from_str::<DevicePatterns>)]
    pub uplinks: Option<DevicePatterns>,
    /// XDP acceleration of service traffic from outside: off or native [default: off]
    #[arg(long, env = "DATAPLANE_XDP", value_name = "MODE", value_parser = parse::from_str::<XdpUse>)]
    pub xdp: Option<XdpUse>,
    /// Routing mode to pods of other nodes: auto, native or vxlan [default: auto]
    #[arg(long, env = "DATAPLANE_ROUTING", value_name = "MODE", value_parser = parse::from_str::<Routing>)]
    pub routing: Option<Routing>,
    /// VXLAN network identifier of the overlay [default: 1]
    #[arg(long, env = "DATAPLANE_VXLAN_VNI", value_name = "N", value_parser = parse::vni)]
    pub vxlan_vni: Option<u32>,
    /// UDP port of the overlay [default: 8472]
    #[arg(long, env = "DATAPLANE_VXLAN_PORT", value_name = "PORT", value_parser = parse::port)]
    pub vxlan_port: Option<u16>,
    /// Name of the overlay device [default: dataplane0]
    #[arg(long, env = "DATAPLANE_VXLAN_DEVICE", value_name = "DEVICE", value_parser = parse::device)]
    pub vxlan_device: Option<String>,
    /// MTU of pods, or auto: that of the uplinks to other nodes, less the tunnel overhead [default:
    /// auto]
    #[arg(long, env = "DATAPLANE_MTU", value_name = "BYTES", value_parser = parse::mtu)]
    pub mtu: Option<Mtu>,
    /// Bits of the packet mark (fwmark) that packets carry once they have been handled [default:
    /// 0x1000]
    #[arg(long, env = "DATAPLANE_MARK", value_name = "BITS", value_parser = parse::mark)]
    pub mark: Option<u32>,
    /// Way of packets between pods and machines outside of the cluster: direct, past the kernel's
    /// stack, or stack, so that FORWARD rules see them [default: direct]
    #[arg(long, env = "DATAPLANE_EGRESS", value_name = "WAY", value_parser = parse::from_str::<Egress>)]
    pub egress: Option<Egress>,
    /// Masquerade packets from pods to destinations outside of the cluster [default: true]
    #[arg(long, env = "DATAPLANE_MASQUERADE_ENABLED", value_name = "BOOL", value_parser = parse::flag)]
    pub masquerade_enabled: Option<bool>,
    /// Destinations without masquerading [default: none]
    #[arg(long, env = "DATAPLANE_MASQUERADE_EXCEPT", value_name = "CIDR,..", value_parser = parse::cidrs)]
    pub masquerade_except: Option<Cidrs>,
    /// Source ports of translated connections [default: 10000-29999]
    #[arg(long, env = "DATAPLANE_MASQUERADE_PORTS", value_name = "FIRST-LAST", value_parser = parse::ports)]
    pub masquerade_ports: Option<RangeInclusive<u16>>,
    /// Choose the backend of TCP connections once, when they connect [default: true]
    #[arg(long, env = "DATAPLANE_CONNECT_TIME_TCP", value_name = "BOOL", value_parser = parse::flag)]
    pub connect_time_tcp: Option<bool>,
    /// Choose the backend of UDP datagrams when a socket connects or sends [default: false]
    #[arg(long, env = "DATAPLANE_CONNECT_TIME_UDP", value_name = "BOOL", value_parser = parse::flag)]
    pub connect_time_udp: Option<bool>,
    /// Load balancing of Services without the annotation: random or maglev [default: random]
    #[arg(long, env = "DATAPLANE_SERVICES_LOAD_BALANCING", value_name = "ALGORITHM", value_parser = parse::from_str::<LoadBalancing>)]
    pub services_load_balancing: Option<LoadBalancing>,
    /// Forwarding to backends on other nodes for Services without the annotation: snat or dsr
    /// [default: snat]
    #[arg(long, env = "DATAPLANE_SERVICES_FORWARDING", value_name = "MODE", value_parser = parse::from_str::<Forwarding>)]
    pub services_forwarding: Option<Forwarding>,
    /// Answer pings to cluster IPs, load balancer and external IPs with a ready backend [default:
    /// true]
    #[arg(long, env = "DATAPLANE_SERVICES_PING", value_name = "BOOL", value_parser = parse::flag)]
    pub services_ping: Option<bool>,
    /// Addresses of this node that accept node ports: all, primary (the InternalIPs) or CIDRs
    /// [default: all]
    #[arg(long, env = "DATAPLANE_NODE_PORTS_ADDRESSES", value_name = "ADDRESSES", value_parser = parse::node_ports)]
    pub node_ports_addresses: Option<NodePortAddresses>,
    /// Serve node ports at loopback addresses, for processes of the node [default: true]
    #[arg(long, env = "DATAPLANE_NODE_PORTS_LOOPBACK", value_name = "BOOL", value_parser = parse::flag)]
    pub node_ports_loopback: Option<bool>,
    /// Namespaces whose pods may have the annotation dataplane.local/allowed-sources [default:
    /// none]
    #[arg(long, env = "DATAPLANE_ALLOWED_SOURCES_NAMESPACES", value_name = "NAMESPACE,..", value_parser = parse::namespaces)]
    pub allowed_sources_namespaces: Option<Namespaces>,
    /// Install the CNI plugin and its configuration [default: true with source kubernetes, else
    /// false]
    #[arg(long, env = "DATAPLANE_CNI_INSTALL", value_name = "BOOL", value_parser = parse::flag)]
    pub cni_install: Option<bool>,
    /// Distribution whose CNI directories are used: standard, microk8s or k3s [default: standard]
    #[arg(long, env = "DATAPLANE_CNI_PRESET", value_name = "NAME", value_parser = parse::from_str::<CniPreset>)]
    pub cni_preset: Option<CniPreset>,
    /// Directory of CNI plugins [default: the preset's]
    #[arg(long, env = "DATAPLANE_CNI_BIN_DIR", value_name = "DIR", value_parser = parse::path)]
    pub cni_bin_dir: Option<PathBuf>,
    /// Directory of CNI configurations [default: the preset's]
    #[arg(long, env = "DATAPLANE_CNI_CONF_DIR", value_name = "DIR", value_parser = parse::path)]
    pub cni_conf_dir: Option<PathBuf>,
    /// Capacity of the endpoint table: addresses of pods and of this node [default: 4096]
    #[arg(long, env = "DATAPLANE_CAPACITY_ENDPOINTS", value_name = "N", value_parser = parse::capacity)]
    pub capacity_endpoints: Option<u32>,
    /// Capacity of the route table: prefixes of other nodes and masquerade exceptions [default:
    /// 32768]
    #[arg(long, env = "DATAPLANE_CAPACITY_ROUTES", value_name = "N", value_parser = parse::capacity)]
    pub capacity_routes: Option<u32>,
    /// Capacity of the service table: frontends of all Services [default: by the node's
    /// memory, at most 131072]
    #[arg(long, env = "DATAPLANE_CAPACITY_SERVICES", value_name = "N", value_parser = parse::capacity)]
    pub capacity_services: Option<u32>,
    /// Capacity of the backend table: backend slots of all Services [default: by the node's
    /// memory, at most 262144]
    #[arg(long, env = "DATAPLANE_CAPACITY_BACKENDS", value_name = "N", value_parser = parse::capacity)]
    pub capacity_backends: Option<u32>,
    /// Capacity of the table of distinct backends [default: by the node's memory, at most 262144]
    #[arg(long, env = "DATAPLANE_CAPACITY_BACKEND_GENERATIONS", value_name = "N", value_parser = parse::capacity)]
    pub capacity_backend_generations: Option<u32>,
    /// Capacity of the flow table: connections translated per packet [default: by the node's
    /// memory, 8192 to 262144]
    #[arg(long, env = "DATAPLANE_CAPACITY_FLOWS", value_name = "N", value_parser = parse::capacity)]
    pub capacity_flows: Option<u32>,
    /// Capacity of the fragment table: packets being reassembled [default: by the node's memory,
    /// at most 4096]
    #[arg(long, env = "DATAPLANE_CAPACITY_FRAGMENTS", value_name = "N", value_parser = parse::capacity)]
    pub capacity_fragments: Option<u32>,
    /// Capacity of the table of Service addresses that datagram sockets have sent to [default:
    /// by the node's memory, at most 65536]
    #[arg(long, env = "DATAPLANE_CAPACITY_DATAGRAM_ORIGINS", value_name = "N", value_parser = parse::capacity)]
    pub capacity_datagram_origins: Option<u32>,
    /// Capacity of the source range table: loadBalancerSourceRanges of all Services [default:
    /// 16384]
    #[arg(long, env = "DATAPLANE_CAPACITY_SOURCE_RANGES", value_name = "N", value_parser = parse::capacity)]
    pub capacity_source_ranges: Option<u32>,
    /// Capacity of the affinity table: clients of Services with session affinity [default: by the
    /// node's memory, at most 65536]
    #[arg(long, env = "DATAPLANE_CAPACITY_AFFINITY", value_name = "N", value_parser = parse::capacity)]
    pub capacity_affinity: Option<u32>,
    /// Bytes of the ring buffer of packet events, a power of two [default: 262144]
    #[arg(long, env = "DATAPLANE_CAPACITY_EVENTS_BYTES", value_name = "N", value_parser = parse::events_bytes)]
    pub capacity_events_bytes: Option<u32>,
    /// Address of /metrics, /healthz and /readyz, or off [default: 127.0.0.1:9964]
    #[arg(long, env = "DATAPLANE_HTTP_BIND_ADDRESS", value_name = "ADDRESS:PORT", value_parser = parse::http)]
    pub http_bind_address: Option<Http>,
    /// Address of kube-proxy's /healthz and /livez, or off [default: 0.0.0.0:10256 with source
    /// kubernetes, else off]
    #[arg(long, env = "DATAPLANE_HEALTHZ_BIND_ADDRESS", value_name = "ADDRESS:PORT", value_parser = parse::http)]
    pub healthz_bind_address: Option<Http>,
    /// Address of kube-proxy's /proxyMode, or off [default: 127.0.0.1:10249 with source kubernetes,
    /// else off]
    #[arg(long, env = "DATAPLANE_PROXY_MODE_BIND_ADDRESS", value_name = "ADDRESS:PORT", value_parser = parse::http)]
    pub proxy_mode_bind_address: Option<Http>,
    /// Log filter: a level, or target=level pairs [default: info]
    #[arg(long, env = "DATAPLANE_LOG", value_name = "FILTER", value_parser = parse::log)]
    pub log: Option<String>,
    /// Log format: text or json [default: text]
    #[arg(long, env = "DATAPLANE_LOG_FORMAT", value_name = "FORMAT", value_parser = parse::from_str::<LogFormat>)]
    pub log_format: Option<LogFormat>,
    /// Log level of the eBPF programs: off, error, warn, info, debug or trace [default: off]
    #[arg(long, env = "DATAPLANE_LOG_EBPF", value_name = "LEVEL", value_parser = parse::from_str::<EbpfLog>)]
    pub log_ebpf: Option<EbpfLog>,
}

/// Error of [`Settings::fill`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FillError {
    Unknown,
    Invalid(Invalid),
}

impl Settings {
    /// Sets a key unless it is set already, and returns whether it did. The value is checked in
    /// both cases.
    pub(super) fn fill(&mut self, key: &str, text: &str) -> Result<bool, FillError> {
        match key {
            "node_name" => fill(&mut self.node_name, parse::node_name(text)),
            "manifests" => fill(&mut self.manifests, parse::path(text)),
            "source" => fill(&mut self.source, parse::from_str(text)),
            "api_server" => fill(&mut self.api_server, parse::servers(text)),
            "kubeconfig" => fill(&mut self.kubeconfig, parse::kubeconfig(text)),
            "state_dir" => fill(&mut self.state_dir, parse::path(text)),
            "run_dir" => fill(&mut self.run_dir, parse::path(text)),
            "bpffs" => fill(&mut self.bpffs, parse::path(text)),
            "cgroup" => fill(&mut self.cgroup, parse::cgroup(text)),
            "uplinks" => fill(&mut self.uplinks, parse::from_str(text)),
            "xdp" => fill(&mut self.xdp, parse::from_str(text)),
            "routing" => fill(&mut self.routing, parse::from_str(text)),
            "vxlan.vni" => fill(&mut self.vxlan_vni, parse::vni(text)),
            "vxlan.port" => fill(&mut self.vxlan_port, parse::port(text)),
            "vxlan.device" => fill(&mut self.vxlan_device, parse::device(text)),
            "mtu" => fill(&mut self.mtu, parse::mtu(text)),
            "mark" => fill(&mut self.mark, parse::mark(text)),
            "egress" => fill(&mut self.egress, parse::from_str(text)),
            "masquerade.enabled" => fill(&mut self.masquerade_enabled, parse::flag(text)),
            "masquerade.except" => fill(&mut self.masquerade_except, parse::cidrs(text)),
            "masquerade.ports" => fill(&mut self.masquerade_ports, parse::ports(text)),
            "connect_time.tcp" => fill(&mut self.connect_time_tcp, parse::flag(text)),
            "services.load_balancing" => fill(&mut self.services_load_balancing, parse::from_str(text)),
            "services.forwarding" => fill(&mut self.services_forwarding, parse::from_str(text)),
            "services.ping" => fill(&mut self.services_ping, parse::flag(text)),
            "node_ports.addresses" => fill(&mut self.node_ports_addresses, parse::node_ports(text)),
            "node_ports.loopback" => fill(&mut self.node_ports_loopback, parse::flag(text)),
            "connect_time.udp" => fill(&mut self.connect_time_udp, parse::flag(text)),
            "allowed_sources_namespaces" => {
                fill(&mut self.allowed_sources_namespaces, parse::namespaces(text))
            }
            "cni.install" => fill(&mut self.cni_install, parse::flag(text)),
            "cni.preset" => fill(&mut self.cni_preset, parse::from_str(text)),
            "cni.bin_dir" => fill(&mut self.cni_bin_dir, parse::path(text)),
            "cni.conf_dir" => fill(&mut self.cni_conf_dir, parse::path(text)),
            "capacity.endpoints" => fill(&mut self.capacity_endpoints, parse::capacity(text)),
            "capacity.routes" => fill(&mut self.capacity_routes, parse::capacity(text)),
            "capacity.services" => fill(&mut self.capacity_services, parse::capacity(text)),
            "capacity.backends" => fill(&mut self.capacity_backends, parse::capacity(text)),
            "capacity.backend_generations" => {
                fill(&mut self.capacity_backend_generations, parse::capacity(text))
            }
            "capacity.flows" => fill(&mut self.capacity_flows, parse::capacity(text)),
            "capacity.fragments" => fill(&mut self.capacity_fragments, parse::capacity(text)),
            "capacity.datagram_origins" => fill(&mut self.capacity_datagram_origins, parse::capacity(text)),
            "capacity.source_ranges" => fill(&mut self.capacity_source_ranges, parse::capacity(text)),
            "capacity.affinity" => fill(&mut self.capacity_affinity, parse::capacity(text)),
            "capacity.events_bytes" => fill(&mut self.capacity_events_bytes, parse::events_bytes(text)),
            "http_bind_address" => fill(&mut self.http_bind_address, parse::http(text)),
            "healthz_bind_address" => fill(&mut self.healthz_bind_address, parse::http(text)),
            "proxy_mode_bind_address" => fill(&mut self.proxy_mode_bind_address, parse::http(text)),
            "log" => fill(&mut self.log, parse::log(text)),
            "log_format" => fill(&mut self.log_format, parse::from_str(text)),
            "log_ebpf" => fill(&mut self.log_ebpf, parse::from_str(text)),
            _ => Err(FillError::Unknown),
        }
    }
}

fn fill<T>(slot: &mut Option<T>, parsed: Result<T, Invalid>) -> Result<bool, FillError> {
    let value = parsed.map_err(FillError::Invalid)?;
    let is_first = slot.is_none();
    slot.get_or_insert(value);
    Ok(is_first)
}
