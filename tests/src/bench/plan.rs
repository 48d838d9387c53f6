//! Which measurements make which row: names, parameters, who takes part, who is the limit. No measuring here.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    load::Load,
    peers::{Cluster, Pair},
    services::ServiceSet,
    site::Site,
};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// A veth between the two ends.
    Raw,
    /// From host to host: the wire between nodes, without pods.
    Hosts,
    /// Linux routing, no rules, no connection tracking.
    Plain,
    /// Linux routing with kube-proxy's nftables rules.
    Nftables,
    /// Linux routing with kube-proxy's iptables rules.
    Iptables,
    /// Ours, as it comes.
    Ours,
    /// Ours, with services translated per packet instead of at connect.
    Packet,
}

impl Variant {
    /// What kube-proxy offers.
    pub const PEERS: [Self; 2] = [Self::Nftables, Self::Iptables];

    pub const fn is_ours(self) -> bool {
        matches!(self, Self::Ours | Self::Packet)
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
            Self::Ours => "ours",
            Self::Packet => "packet",
        })
    }
}

/// One load, run by every variant of it in every round.
#[derive(Clone, Debug)]
pub struct Case {
    pub row: &'static str,
    pub params: Map<String, Value>,
    pub load: Load,
    /// What nobody can beat here.
    pub limit: Variant,
    pub sites: Vec<(Variant, Site)>,
}

impl Case {
    pub fn title(&self) -> String {
        let params: Vec<String> = self.params.iter().map(|(key, value)| format!("{key}={value}")).collect();
        format!("{} {}", self.row, params.join(" ").replace('"', ""))
    }

    /// Leaves out who is not wanted; a case without anybody left is none.
    pub fn keep(mut self, wanted: &BTreeSet<Variant>) -> Option<Self> {
        self.sites.retain(|(variant, _)| wanted.contains(variant));
        (!self.sites.is_empty()).then_some(self)
    }
}

/// Services in the small and in the large cluster.
pub const SERVICE_COUNTS: [u16; 2] = [10, 1_000];

/// Connections of the row with several.
const MANY: usize = 8;

/// A routing mode's participants, for rows between nodes and inside one.
#[derive(Clone, Debug)]
pub struct Participants<'a> {
    pub plain: &'a Cluster,
    pub nftables: &'a Cluster,
    pub iptables: &'a Cluster,
}

impl Participants<'_> {
    fn sites(&self, site: impl Fn(&Cluster) -> Site) -> Vec<(Variant, Site)> {
        vec![
            (Variant::Plain, site(self.plain)),
            (Variant::Nftables, site(self.nftables)),
            (Variant::Iptables, site(self.iptables)),
        ]
    }
}

/// Row 5: two pods of one node.
pub fn same_node(raw: &Pair, peers: &Participants<'_>, ours: Option<&Site>) -> Vec<Case> {
    let loads = [
        (Load::TcpRr { connections: 1 }, "tcp"),
        (Load::TcpRr { connections: MANY }, "tcp"),
        (Load::UdpRr, "udp"),
    ];
    let case = |(load, protocol)| {
        let mut sites = vec![(Variant::Raw, raw.site())];
        sites.extend(peers.sites(Cluster::same_node));
        sites.extend(ours.cloned().map(|site| (Variant::Ours, site)));
        let connections = if let Load::TcpRr { connections } = load { connections } else { 1 };
        let params = params(&[("protocol", json!(protocol)), ("connections", json!(connections))]);
        Case { row: "same_node_rr", params, load, limit: Variant::Raw, sites }
    };
    loads.into_iter().map(case).collect()
}

/// Row 6: a connection's whole life through a cluster address, its backend on the same node.
pub fn cluster_ip(
    raw: &Pair,
    peers: &Participants<'_>,
    services: &ServiceSet,
    ours: Vec<(Variant, Site)>,
) -> Case {
    let mut sites = vec![(Variant::Raw, raw.site())];
    for (variant, site) in peers.sites(Cluster::same_node) {
        // plain routing knows no services: it goes to the backend itself, which is why it is the limit
        let site = if variant == Variant::Plain { site } else { site.through(services.target()) };
        sites.push((variant, site));
    }
    sites.extend(ours);
    let params = params(&[("services", json!(services.iter().count()))]);
    Case { row: "clusterip_crr", params, load: Load::TcpCrr, limit: Variant::Plain, sites }
}

/// Row 8: pods of two nodes.
pub fn two_nodes(routing: &str, peers: &Participants<'_>, ours: Option<&Site>) -> Vec<Case> {
    let loads = [("two_node_rr", Load::TcpRr { connections: 1 }), ("two_node_crr", Load::TcpCrr)];
    let case = |(row, load)| {
        let mut sites = vec![(Variant::Hosts, peers.plain.hosts())];
        sites.extend(peers.sites(Cluster::two_nodes));
        sites.extend(ours.cloned().map(|site| (Variant::Ours, site)));
        let params = params(&[("routing", json!(routing))]);
        Case { row, params, load, limit: Variant::Hosts, sites }
    };
    loads.into_iter().map(case).collect()
}

fn params(pairs: &[(&str, Value)]) -> Map<String, Value> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
}
