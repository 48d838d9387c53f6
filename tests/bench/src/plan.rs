//! The rows of the benchmark: names, parameters, variants and limits.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    baselines::{Cluster, Pair},
    forward::{FLOWS, Forwarder},
    load::Load,
    path::TrafficPath,
    services::ServiceSet,
    workload::Workload,
};

/// A measured variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// A veth between client and server.
    Raw,
    /// From host to host: the path between nodes, without pods.
    Hosts,
    /// Linux routing, no rules, no connection tracking.
    Plain,
    /// Linux routing with kube-proxy's nftables rules.
    Nftables,
    /// Linux routing with kube-proxy's iptables rules.
    Iptables,
    /// Linux routing with one rule that masquerades pods.
    Masquerade,
    /// The datapath with default settings.
    Ours,
    /// The datapath with per-packet instead of connect-time translation.
    Packet,
    /// The datapath with native XDP on the uplink, for clients outside.
    Xdp,
    /// The same with direct server return.
    #[value(name = "xdp-dsr")]
    #[serde(rename = "xdp-dsr")]
    XdpDsr,
    /// The datapath with tc on the uplink, for clients outside.
    Tc,
    /// Programs without maps that redirect or pass every packet.
    Empty,
    /// Katran's program.
    Katran,
    /// Calico's program.
    Calico,
}

impl Variant {
    /// The modes of kube-proxy.
    pub const KUBE_PROXY: [Self; 2] = [Self::Nftables, Self::Iptables];
    /// What masquerades pods.
    pub const MASQUERADE: [Self; 3] = [Self::Masquerade, Self::Nftables, Self::Iptables];

    pub const fn is_dataplane(self) -> bool {
        matches!(self, Self::Ours | Self::Packet | Self::Xdp | Self::XdpDsr | Self::Tc)
    }

    /// Returns the row parameter that distinguishes variants of the datapath in the same row.
    pub const fn row_parameter(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Xdp => Some(("way", "xdp")),
            Self::XdpDsr => Some(("way", "xdp with dsr")),
            Self::Tc => Some(("way", "tc")),
            _ => None,
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Hosts => "hosts",
            Self::Plain => "plain",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Masquerade => "masquerade",
            Self::Ours => "ours",
            Self::Packet => "packet",
            Self::Xdp => "xdp",
            Self::XdpDsr => "xdp-dsr",
            Self::Tc => "tc",
            Self::Empty => "empty",
            Self::Katran => "katran",
            Self::Calico => "calico",
        })
    }
}

/// Names of rows.
pub mod row {
    pub const SAME_NODE_RR: &str = "same_node_rr";
    pub const CLUSTERIP_CRR: &str = "clusterip_crr";
    pub const TWO_NODE_RR: &str = "two_node_rr";
    pub const TWO_NODE_CRR: &str = "two_node_crr";
    pub const OUTSIDE_CRR: &str = "outside_crr";
    pub const BULK: &str = "bulk";
    pub const NODEPORT_UDP: &str = "nodeport_udp";
    pub const PROGRAM_NODE_PORT: &str = "program_nodeport";
    pub const NEW_FLOW: &str = "new_flow";
    pub const PROGRAM_OTHER: &str = "program_no_service";
    pub const PROGRAM_POD: &str = "program_pod";
    /// Rows that run programs without devices.
    pub const PROGRAM_RUNS: [&str; 4] = [PROGRAM_NODE_PORT, NEW_FLOW, PROGRAM_OTHER, PROGRAM_POD];
}

/// The selected part of the benchmark.
#[derive(Clone, Debug)]
pub struct Selection {
    pub variants: BTreeSet<Variant>,
    /// Substring of the names of rows.
    pub rows: String,
    /// Numbers of Services, of [`SERVICE_COUNTS`].
    pub services: Vec<u16>,
}

impl Selection {
    pub fn has(&self, variant: Variant) -> bool {
        self.variants.contains(&variant)
    }

    pub fn has_any(&self, rows: &[&str]) -> bool {
        rows.iter().any(|row| row.contains(&self.rows))
    }

    /// Returns the selected numbers of Services of `clusterip_crr`.
    pub fn service_counts(&self) -> Vec<u16> {
        let is_wanted = |count: &u16| self.has_any(&[row::CLUSTERIP_CRR]) && self.services.contains(count);
        SERVICE_COUNTS.into_iter().filter(is_wanted).collect()
    }
}

/// A load with parameters, run by all its variants in every round.
#[derive(Clone, Debug)]
pub struct Case {
    pub row: &'static str,
    pub params: Map<String, Value>,
    /// The variant that is the limit.
    pub limit: Variant,
    /// The variants of other projects; the best of them is the row's peer.
    pub peers: &'static [Variant],
    pub workloads: Vec<(Variant, Workload)>,
}

impl Case {
    pub fn title(&self) -> String {
        let params: Vec<String> = self.params.iter().map(|(key, value)| format!("{key}={value}")).collect();
        format!("{} {}", self.row, params.join(" ").replace('"', ""))
    }

    /// Whether a ratio uses both cases: two numbers of Services, or the limit measured twice.
    pub fn is_compared_with(&self, other: &Self) -> bool {
        self.row == other.row && self.row == row::CLUSTERIP_CRR
    }

    /// Removes variants that are not selected; `None` if no variant remains.
    pub fn keep(mut self, selection: &Selection) -> Option<Self> {
        self.workloads.retain(|(variant, _)| selection.has(*variant));
        (selection.has_any(&[self.row]) && !self.workloads.is_empty()).then_some(self)
    }
}

/// Numbers of Services in a small, a large and a very large cluster.
pub const SERVICE_COUNTS: [u16; 3] = [10, 1_000, 30_000];

/// Largest number of Services with kube-proxy's rules: `nft` needs 15 minutes or more to load the
/// rules of the very large cluster.
pub const MAX_RULE_SERVICES: u16 = 1_000;

/// Number of connections in the row with several.
const MANY_CONNECTIONS: usize = 8;

/// The baselines of a routing mode.
#[derive(Clone, Debug)]
pub struct Baselines<'a> {
    pub plain: &'a Cluster,
    pub nftables: &'a Cluster,
    pub iptables: &'a Cluster,
}

impl Baselines<'_> {
    fn paths(&self, path: impl Fn(&Cluster) -> TrafficPath) -> Vec<(Variant, TrafficPath)> {
        vec![
            (Variant::Plain, path(self.plain)),
            (Variant::Nftables, path(self.nftables)),
            (Variant::Iptables, path(self.iptables)),
        ]
    }
}

/// Returns the cases between two pods of one node.
pub fn same_node(raw: &Pair, baselines: &Baselines<'_>, dataplane: Option<&TrafficPath>) -> Vec<Case> {
    let loads = [
        (Load::TcpRr { connections: 1 }, "tcp"),
        (Load::TcpRr { connections: MANY_CONNECTIONS }, "tcp"),
        (Load::UdpRr, "udp"),
    ];
    let case = |(load, protocol)| {
        let mut paths = vec![(Variant::Raw, raw.path())];
        paths.extend(baselines.paths(Cluster::same_node));
        paths.extend(dataplane.cloned().map(|path| (Variant::Ours, path)));
        let connections = if let Load::TcpRr { connections } = load { connections } else { 1 };
        let params = params(&[("protocol", json!(protocol)), ("connections", json!(connections))]);
        Case {
            row: row::SAME_NODE_RR,
            params,
            limit: Variant::Raw,
            peers: &Variant::KUBE_PROXY,
            workloads: client_server(load, paths),
        }
    };
    loads.into_iter().map(case).collect()
}

/// Returns the case of short connections to a cluster IP with a backend on the same node.
pub fn cluster_ip(
    raw: &Pair,
    baselines: &Baselines<'_>,
    services: &ServiceSet,
    dataplane: Vec<(Variant, TrafficPath)>,
) -> Case {
    let mut paths = vec![(Variant::Raw, raw.path())];
    for (variant, path) in baselines.paths(Cluster::same_node) {
        // plain routing has no Services: it connects to the backend, so it is the limit
        let path = if variant == Variant::Plain { path } else { path.through(services.target()) };
        paths.push((variant, path));
    }
    paths.extend(dataplane);
    let count = services.iter().count();
    if count > usize::from(MAX_RULE_SERVICES) {
        paths.retain(|(variant, _)| !Variant::KUBE_PROXY.contains(variant));
    }
    let params = params(&[("services", json!(count))]);
    Case {
        row: row::CLUSTERIP_CRR,
        params,
        limit: Variant::Plain,
        peers: &Variant::KUBE_PROXY,
        workloads: client_server(Load::TcpCrr, paths),
    }
}

/// Returns the cases between pods of two nodes.
/// `empty`: programs that only redirect.
pub fn two_nodes(
    routing: &str,
    baselines: &Baselines<'_>,
    empty: Option<&TrafficPath>,
    dataplane: Option<&TrafficPath>,
) -> Vec<Case> {
    let loads = [(row::TWO_NODE_RR, Load::TcpRr { connections: 1 }), (row::TWO_NODE_CRR, Load::TcpCrr)];
    let case = |(row, load)| {
        let mut paths = vec![(Variant::Hosts, baselines.plain.hosts())];
        paths.extend(baselines.paths(Cluster::two_nodes));
        paths.extend(empty.cloned().map(|path| (Variant::Empty, path)));
        paths.extend(dataplane.cloned().map(|path| (Variant::Ours, path)));
        let params = params(&[("routing", json!(routing))]);
        Case {
            row,
            params,
            limit: Variant::Hosts,
            peers: &Variant::KUBE_PROXY,
            workloads: client_server(load, paths),
        }
    };
    loads.into_iter().map(case).collect()
}

/// Returns the case of short connections from a pod to a server outside of the cluster.
pub fn outside(paths: Vec<(Variant, TrafficPath)>) -> Case {
    Case {
        row: row::OUTSIDE_CRR,
        params: Map::new(),
        limit: Variant::Plain,
        peers: &Variant::MASQUERADE,
        workloads: client_server(Load::TcpCrr, paths),
    }
}

/// Returns the cases of bulk data between two pods of `nodes` nodes, on `path` of the baselines,
/// with and without segmentation offload.
pub fn bulk(
    nodes: u8,
    raw: &Pair,
    baselines: &Baselines<'_>,
    path: impl Fn(&Cluster) -> TrafficPath,
    dataplane: Option<&TrafficPath>,
) -> Vec<Case> {
    let mut paths = vec![(Variant::Raw, raw.path())];
    paths.extend(baselines.paths(path));
    paths.extend(dataplane.cloned().map(|path| (Variant::Ours, path)));
    let case = |(gso, workload): (&str, fn(TrafficPath) -> Workload)| Case {
        row: row::BULK,
        params: params(&[("nodes", json!(nodes)), ("gso", json!(gso))]),
        limit: Variant::Raw,
        peers: &Variant::KUBE_PROXY,
        workloads: paths.iter().map(|(variant, path)| (*variant, workload(path.clone()))).collect(),
    };
    [case(("on", |path| Workload::ClientServer(path, Load::Bulk))), case(("off", Workload::Segmented))].into()
}

/// Returns the case of a node port with an outside client and a backend on another node.
pub fn node_port(forwarders: impl Iterator<Item = (Variant, Forwarder)>) -> Case {
    let workloads = forwarders.map(|(variant, forwarder)| (variant, Workload::Forward(forwarder))).collect();
    let params = params(&[("flows", json!(FLOWS))]);
    Case { row: row::NODEPORT_UDP, params, limit: Variant::Raw, peers: &Variant::KUBE_PROXY, workloads }
}

fn client_server(load: Load, paths: Vec<(Variant, TrafficPath)>) -> Vec<(Variant, Workload)> {
    paths.into_iter().map(|(variant, path)| (variant, Workload::ClientServer(path, load))).collect()
}

fn params(pairs: &[(&str, Value)]) -> Map<String, Value> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
}
