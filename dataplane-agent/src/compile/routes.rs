//! Nodes → entries of `ROUTES`, and kernel routes for traffic of the host itself.
//!
//! Compiles one node at a time: adding or removing a node costs the same in every cluster.

use std::net::IpAddr;

use dataplane_common::abi::{Addr, FlowHints, Route, RouteKind};
use ipnet::IpNet;

use super::prefixes;
use crate::{
    datapath::table::RoutePrefix,
    netlink::{KernelRoute, Uplink, uplink::on_link},
    state::Node,
};

/// How packets to other nodes are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RoutingMode {
    /// Natively to neighbours on an uplink, through the overlay otherwise.
    #[default]
    Auto,
    /// Natively; other nodes are unreachable.
    Native,
    /// Through the overlay.
    Vxlan,
}

/// The overlay device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay {
    pub ifindex: u32,
    pub mtu: u32,
}

/// The network of this node, for routes to other nodes.
#[derive(Clone, Copy, Debug)]
pub struct Network<'a> {
    /// This node.
    pub own: &'a Node,
    pub uplinks: &'a [Uplink],
    pub mode: RoutingMode,
    pub overlay: Option<Overlay>,
}

/// The routes to one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRoutes {
    pub datapath: Vec<(RoutePrefix, Route)>,
    pub kernel: Vec<KernelRoute>,
    pub problems: Vec<Problem>,
}

/// Why part of a node is unreachable.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    pub node: String,
    /// Path of the field in the Node object.
    pub field: &'static str,
    pub message: String,
}

/// The path to an address or prefix.
enum Path<'a> {
    Native { next_hop: IpAddr, uplink: &'a Uplink },
    Overlay { tunnel_endpoint: IpAddr, source: Option<IpAddr>, device: Overlay },
}

/// Routes to another node: its pod CIDRs and its own addresses.
pub fn remote(node: &Node, network: &Network<'_>) -> NodeRoutes {
    let mut routes = NodeRoutes::default();
    for cidr in &node.pod_cidrs {
        if let Some(own) = network.own.pod_cidrs.iter().find(|own| overlap(own, cidr)) {
            let message = format!(
                "{cidr} overlaps {own} of this node ({}); pods in it are unreachable",
                network.own.name
            );
            routes.problem(node, "spec.podCIDRs", message);
            continue;
        }
        match path(node, *cidr, network) {
            Ok(path) => {
                routes.datapath.extend(rows(cidr, path.route()));
                routes.kernel.push(path.kernel_route(*cidr));
            }
            Err(message) => {
                routes.problem(
                    node,
                    "status.addresses",
                    format!("pods in {cidr} are unreachable: {message}"),
                );
            }
        }
    }
    for ip in &node.internal_ips {
        if network.own.internal_ips.contains(ip) {
            let message = format!("{ip} is an address of this node ({})", network.own.name);
            routes.problem(node, "status.addresses", message);
            continue;
        }
        // the kernel has its own routes to nodes
        match path(node, (*ip).into(), network) {
            Ok(path) => routes.datapath.extend(rows(&(*ip).into(), path.route())),
            Err(message) => {
                routes.problem(node, "status.addresses", format!("{ip} is unreachable: {message}"));
            }
        }
    }
    routes
}

/// Routes of this node's pod CIDRs: packets to an address without an endpoint are dropped.
pub fn local(node: &Node) -> Vec<(RoutePrefix, Route)> {
    node.pod_cidrs.iter().flat_map(|cidr| rows(cidr, terminal(RouteKind::Local))).collect()
}

/// Destinations outside the cluster that are not masqueraded.
pub fn exceptions(cidrs: &[IpNet]) -> Vec<(RoutePrefix, Route)> {
    cidrs.iter().flat_map(|cidr| rows(cidr, terminal(RouteKind::NoMasquerade))).collect()
}

/// Ranges of cluster IPs: packets to an address without a Service are dropped.
pub fn service_cidrs(cidrs: &[IpNet]) -> Vec<(RoutePrefix, Route)> {
    cidrs.iter().flat_map(|cidr| rows(cidr, terminal(RouteKind::Services))).collect()
}

/// Kernel routes of the host's processes to ranges of cluster IPs: out of the uplink that has the
/// node's address of the family, else the first.
pub fn to_service_cidrs(cidrs: &[IpNet], uplinks: &[Uplink], sources: &[IpAddr]) -> Vec<KernelRoute> {
    let route = |cidr: &IpNet| {
        let source = *sources.iter().find(|source| source.is_ipv4() == cidr.addr().is_ipv4())?;
        let has_source = |uplink: &&Uplink| uplink.addresses.iter().any(|network| network.addr() == source);
        let uplink = uplinks.iter().find(has_source).or_else(|| uplinks.first())?;
        Some(KernelRoute::to_services(*cidr, uplink.ifindex, source))
    };
    cidrs.iter().filter_map(route).collect()
}

/// Converts a network to table keys: one, unless it is an IPv6 network that contains the
/// IPv4-mapped addresses.
pub fn keys(network: &IpNet) -> impl Iterator<Item = RoutePrefix> {
    prefixes::prefixes(network).into_iter().map(|(addr, bits)| RoutePrefix { addr, bits })
}

fn rows(network: &IpNet, route: Route) -> impl Iterator<Item = (RoutePrefix, Route)> {
    keys(network).map(move |key| (key, route))
}

/// Converts a table key to a network.
pub fn network(prefix: &RoutePrefix) -> Option<IpNet> {
    let ip = prefix.addr.to_ip();
    let base = if ip.is_ipv4() { Addr::V4_PREFIX_BITS } else { 0 };
    IpNet::new(ip, u8::try_from(prefix.bits.checked_sub(base)?).ok()?).ok()
}

fn terminal(kind: RouteKind) -> Route {
    Route { next_hop: Addr::UNSPECIFIED, ifindex: 0, kind: kind as u32, mtu: 0, flow_hints: FlowHints::NONE }
}

fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn path<'a>(node: &Node, destination: IpNet, network: &Network<'a>) -> Result<Path<'a>, String> {
    match network.mode {
        RoutingMode::Native => native(node, destination, network),
        RoutingMode::Vxlan => overlay(node, destination, network),
        RoutingMode::Auto => native(node, destination, network).or_else(|not_native| {
            overlay(node, destination, network).map_err(|error| format!("{not_native}; {error}"))
        }),
    }
}

/// A path over a neighbour on an uplink. IPv4 packets may use an IPv6 next hop (RFC 5549), not the
/// reverse.
fn native<'a>(node: &Node, destination: IpNet, network: &Network<'a>) -> Result<Path<'a>, String> {
    let ipv6 = destination.addr().is_ipv6();
    let mut hops: Vec<IpAddr> =
        node.internal_ips.iter().copied().filter(|ip| ip.is_ipv6() || !ipv6).collect();
    // a node address is its own next hop; otherwise the destination's family is preferred
    hops.sort_by_key(|ip| (*ip != destination.addr(), ip.is_ipv6() != ipv6));
    for next_hop in hops {
        if let Some(uplink) = on_link(network.uplinks, next_hop) {
            return Ok(Path::Native { next_hop, uplink });
        }
    }
    Err("native routing is impossible: no InternalIP of the node is in a subnet of an uplink of this node"
        .to_owned())
}

/// A path through the tunnel, between addresses of a family both nodes have; IPv4 has the smaller
/// header.
fn overlay<'a>(node: &Node, destination: IpNet, network: &Network<'a>) -> Result<Path<'a>, String> {
    let Some(device) = network.overlay else { return Err("this node has no overlay device".to_owned()) };
    let own = &network.own.internal_ips;
    let mut tunnel_endpoints: Vec<IpAddr> = node.internal_ips.clone();
    tunnel_endpoints.retain(|end| own.iter().any(|ip| ip.is_ipv4() == end.is_ipv4()));
    tunnel_endpoints.sort_by_key(IpAddr::is_ipv6);
    let Some(tunnel_endpoint) = tunnel_endpoints.first().copied() else {
        return Err("the node and this node have no InternalIP of the same family".to_owned());
    };
    let source = own.iter().copied().find(|ip| ip.is_ipv4() == destination.addr().is_ipv4());
    Ok(Path::Overlay { tunnel_endpoint, source, device })
}

impl Path<'_> {
    fn route(&self) -> Route {
        let (next_hop, ifindex, kind, mtu) = match self {
            Self::Native { next_hop, uplink } => (next_hop, uplink.ifindex, RouteKind::Native, uplink.mtu),
            Self::Overlay { tunnel_endpoint, device, .. } => {
                (tunnel_endpoint, device.ifindex, RouteKind::Overlay, device.mtu)
            }
        };
        Route { next_hop: (*next_hop).into(), ifindex, kind: kind as u32, mtu, flow_hints: FlowHints::NONE }
    }

    fn kernel_route(&self, destination: IpNet) -> KernelRoute {
        match self {
            Self::Native { next_hop, uplink } => {
                KernelRoute { gateway: Some(*next_hop), ..KernelRoute::on_link(destination, uplink.ifindex) }
            }
            Self::Overlay { source, device, .. } => {
                KernelRoute { source: *source, ..KernelRoute::on_link(destination, device.ifindex) }
            }
        }
    }
}

impl NodeRoutes {
    fn problem(&mut self, node: &Node, field: &'static str, message: String) {
        self.problems.push(Problem { node: node.name.clone(), field, message });
    }
}

#[cfg(test)]
mod tests {
    use dataplane_common::abi::MacAddr;

    use super::*;
    use crate::state::Owner;

    fn node(name: &str, ips: &[&str], cidrs: &[&str]) -> Node {
        Node {
            name: name.to_owned(),
            owner: Owner::default(),
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            internal_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            ..Node::default()
        }
    }

    fn uplink() -> Uplink {
        Uplink {
            name: "eth0".to_owned(),
            ifindex: 2,
            mtu: 1_500,
            mac: Some(MacAddr::new([2, 0, 0, 0, 0, 1])),
            addresses: vec!["192.168.1.1/24".parse().unwrap(), "fd00::1/64".parse().unwrap()],
            sources: Vec::new(),
            bridge: false,
        }
    }

    fn routes(mode: RoutingMode, remote_node: &Node) -> NodeRoutes {
        let own = node("a", &["192.168.1.1", "fd00::1"], &["10.1.0.0/24", "fd01::/64"]);
        let overlay = (mode != RoutingMode::Native).then_some(Overlay { ifindex: 9, mtu: 1_450 });
        remote(remote_node, &Network { own: &own, uplinks: &[uplink()], mode, overlay })
    }

    fn listed(routes: &NodeRoutes) -> Vec<String> {
        let show = |(prefix, route): &(RoutePrefix, Route)| {
            let kind = route.kind().unwrap();
            format!(
                "{} {kind:?} {} dev {} mtu {}",
                network(prefix).unwrap(),
                route.next_hop,
                route.ifindex,
                route.mtu
            )
        };
        routes.datapath.iter().map(show).chain(routes.kernel.iter().map(ToString::to_string)).collect()
    }

    #[test]
    fn neighbour_is_routed_natively_in_same_family() {
        let routes = routes(
            RoutingMode::Auto,
            &node("b", &["192.168.1.2", "fd00::2"], &["10.1.1.0/24", "fd01:0:0:1::/64"]),
        );
        assert_eq!(
            listed(&routes),
            [
                "10.1.1.0/24 Native 192.168.1.2 dev 2 mtu 1500",
                "fd01:0:0:1::/64 Native fd00::2 dev 2 mtu 1500",
                "192.168.1.2/32 Native 192.168.1.2 dev 2 mtu 1500",
                "fd00::2/128 Native fd00::2 dev 2 mtu 1500",
                "10.1.1.0/24 via 192.168.1.2 dev 2",
                "fd01:0:0:1::/64 via fd00::2 dev 2",
            ]
        );
        assert_eq!(routes.problems, []);
    }

    #[test]
    fn node_behind_router_is_routed_through_overlay() {
        let routes =
            routes(RoutingMode::Auto, &node("b", &["192.168.2.2"], &["10.1.1.0/24", "fd01:0:0:1::/64"]));
        assert_eq!(
            listed(&routes),
            [
                "10.1.1.0/24 Overlay 192.168.2.2 dev 9 mtu 1450",
                "fd01:0:0:1::/64 Overlay 192.168.2.2 dev 9 mtu 1450",
                "192.168.2.2/32 Overlay 192.168.2.2 dev 9 mtu 1450",
                "10.1.1.0/24 dev 9",
                "fd01:0:0:1::/64 dev 9",
            ]
        );
        assert_eq!(routes.kernel[1].source, Some("fd00::1".parse().unwrap()));
    }

    #[test]
    fn ipv4_may_use_ipv6_next_hop_but_not_reverse() {
        let only_v6 = routes(RoutingMode::Native, &node("b", &["fd00::2"], &["10.1.1.0/24"]));
        assert_eq!(only_v6.kernel[0].gateway, Some("fd00::2".parse().unwrap()));
        let only_v4 = routes(RoutingMode::Native, &node("b", &["192.168.1.2"], &["fd01:0:0:1::/64"]));
        assert!(only_v4.kernel.is_empty());
        assert_eq!((only_v4.problems[0].node.as_str(), only_v4.problems[0].field), ("b", "status.addresses"));
    }

    #[test]
    fn native_mode_reports_unreachable_node() {
        let routes = routes(RoutingMode::Native, &node("far", &["192.168.2.2"], &["10.1.1.0/24"]));
        assert!(routes.datapath.is_empty() && routes.kernel.is_empty());
        assert!(routes.problems.iter().all(|problem| problem.node == "far"));
        assert_eq!(routes.problems.len(), 2);
    }

    #[test]
    fn overlapping_pod_cidr_is_a_problem_and_has_no_route() {
        let routes = routes(RoutingMode::Auto, &node("b", &["192.168.1.2"], &["10.1.0.0/16"]));
        assert!(routes.kernel.is_empty());
        assert!(routes.problems[0].message.contains("10.1.0.0/24 of this node"), "{:?}", routes.problems);
    }

    #[test]
    fn prefix_conversion_round_trips() {
        for text in ["10.1.2.0/24", "0.0.0.0/0", "fd00::/8", "2000::/3", "10.0.0.1/32"] {
            let cidr: IpNet = text.parse().unwrap();
            assert_eq!(keys(&cidr).map(|key| network(&key)).collect::<Vec<_>>(), [Some(cidr)]);
        }
    }
}
