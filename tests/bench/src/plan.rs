//! Which measurements make which row: names, parameters, who takes part, who is the limit. No measuring here.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    forward::{FLOWS, Forwarder},
    load::Load,
    peers::{Cluster, Pair},
    services::ServiceSet,
    site::Site,
    work::Work,
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
    /// Ours, with services asked from outside in the uplink's driver.
    Xdp,
    /// The same, and the pod's node answers.
    #[value(name = "xdp-dsr")]
    #[serde(rename = "xdp-dsr")]
    XdpDsr,
    /// Ours, with services asked from outside at tc.
    Tc,
}

impl Variant {
    /// What kube-proxy offers.
    pub const PEERS: [Self; 2] = [Self::Nftables, Self::Iptables];

    pub const fn is_ours(self) -> bool {
        matches!(self, Self::Ours | Self::Packet | Self::Xdp | Self::XdpDsr | Self::Tc)
    }

    /// What tells it from other ways of ours in the same row.
    pub const fn way(self) -> Option<(&'static str, &'static str)> {
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
            Self::Ours => "ours",
            Self::Packet => "packet",
            Self::Xdp => "xdp",
            Self::XdpDsr => "xdp-dsr",
            Self::Tc => "tc",
        })
    }
}

/// Names of rows.
pub mod row {
    pub const SAME_NODE_RR: &str = "same_node_rr";
    pub const CLUSTERIP_CRR: &str = "clusterip_crr";
    pub const TWO_NODE_RR: &str = "two_node_rr";
    pub const TWO_NODE_CRR: &str = "two_node_crr";
    pub const NODEPORT_UDP: &str = "nodeport_udp";
}

/// What of the benchmark is to be run.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub variants: BTreeSet<Variant>,
    /// Part of the names of rows.
    pub rows: String,
    /// Of [`SERVICE_COUNTS`].
    pub services: Vec<u16>,
}

impl Wanted {
    pub fn has(&self, variant: Variant) -> bool {
        self.variants.contains(&variant)
    }

    pub fn has_any(&self, rows: &[&str]) -> bool {
        rows.iter().any(|row| row.contains(&self.rows))
    }

    /// Numbers of services clusters of `clusterip_crr` are made with.
    pub fn service_counts(&self) -> Vec<u16> {
        let is_wanted = |count: &u16| self.has_any(&[row::CLUSTERIP_CRR]) && self.services.contains(count);
        SERVICE_COUNTS.into_iter().filter(is_wanted).collect()
    }
}

/// One load, run by every variant of it in every round.
#[derive(Clone, Debug)]
pub struct Case {
    pub row: &'static str,
    pub params: Map<String, Value>,
    /// What nobody can beat here.
    pub limit: Variant,
    pub work: Vec<(Variant, Work)>,
}

impl Case {
    pub fn title(&self) -> String {
        let params: Vec<String> = self.params.iter().map(|(key, value)| format!("{key}={value}")).collect();
        format!("{} {}", self.row, params.join(" ").replace('"', ""))
    }

    /// Whether a ratio is made of both: of one number of services and another, and of the limit, which knows no services, in
    /// either.
    pub fn is_compared_with(&self, other: &Self) -> bool {
        self.row == other.row && self.row == row::CLUSTERIP_CRR
    }

    /// Leaves out who is not wanted; a case without anybody left is none.
    pub fn keep(mut self, wanted: &Wanted) -> Option<Self> {
        self.work.retain(|(variant, _)| wanted.has(*variant));
        (wanted.has_any(&[self.row]) && !self.work.is_empty()).then_some(self)
    }
}

/// Services in a small, a large and a huge cluster.
pub const SERVICE_COUNTS: [u16; 3] = [10, 1_000, 30_000];

/// Kube-proxy's rules are measured up to so many services. `nft` takes a quarter of an hour and more to load those of the huge
/// cluster: what a service costs them shows before.
pub const MOST_RULES: u16 = 1_000;

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
        Case { row: row::SAME_NODE_RR, params, limit: Variant::Raw, work: asking(load, sites) }
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
    let count = services.iter().count();
    if count > usize::from(MOST_RULES) {
        sites.retain(|(variant, _)| !Variant::PEERS.contains(variant));
    }
    let params = params(&[("services", json!(count))]);
    Case { row: row::CLUSTERIP_CRR, params, limit: Variant::Plain, work: asking(Load::TcpCrr, sites) }
}

/// Row 8: pods of two nodes.
pub fn two_nodes(routing: &str, peers: &Participants<'_>, ours: Option<&Site>) -> Vec<Case> {
    let loads = [(row::TWO_NODE_RR, Load::TcpRr { connections: 1 }), (row::TWO_NODE_CRR, Load::TcpCrr)];
    let case = |(row, load)| {
        let mut sites = vec![(Variant::Hosts, peers.plain.hosts())];
        sites.extend(peers.sites(Cluster::two_nodes));
        sites.extend(ours.cloned().map(|site| (Variant::Ours, site)));
        let params = params(&[("routing", json!(routing))]);
        Case { row, params, limit: Variant::Hosts, work: asking(load, sites) }
    };
    loads.into_iter().map(case).collect()
}

/// Row 10: a port of a node, asked from outside, that leads to a pod of another node.
pub fn node_port(forwarders: impl Iterator<Item = (Variant, Forwarder)>) -> Case {
    let work = forwarders.map(|(variant, forwarder)| (variant, Work::Forward(forwarder))).collect();
    let params = params(&[("flows", json!(FLOWS))]);
    Case { row: row::NODEPORT_UDP, params, limit: Variant::Raw, work }
}

fn asking(load: Load, sites: Vec<(Variant, Site)>) -> Vec<(Variant, Work)> {
    sites.into_iter().map(|(variant, site)| (variant, Work::Ask(site, load))).collect()
}

fn params(pairs: &[(&str, Value)]) -> Map<String, Value> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
}
