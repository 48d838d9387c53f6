//! The rules by which devices are taken as uplinks: pure functions.

use std::{collections::BTreeSet, fmt};

use ipnet::IpNet;
use rtnetlink::packet_route::{
    link::InfoKind,
    route::{RouteAttribute, RouteMessage, RouteType},
};

use super::{
    DevicePatterns, HostAddress, Link, LinkHeader,
    device_patterns::Match,
    route::{PROTOCOL, read},
};

/// What decides about a device, besides its own properties.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    pub patterns: &'a DevicePatterns,
    /// Name of our overlay device.
    pub overlay: &'a str,
    pub links: &'a [Link],
    /// Addresses that other hosts can reach.
    pub addresses: &'a [HostAddress],
    /// Devices that routes lead to: see [`route_devices`].
    pub routes: &'a BTreeSet<u32>,
    /// Devices that are uplinks now.
    pub before: &'a BTreeSet<u32>,
}

/// Whether a device is an uplink, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Uplink(Why),
    NotUplink(WhyNot),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    Named,
    Included(String),
    Address,
    Route,
    /// It was one before it went down.
    WasUp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum WhyNot {
    Loopback,
    Overlay,
    UnknownLinkHeader,
    Excluded(String),
    NotListed,
    /// Packets do not leave the node by devices of this kind.
    Virtual(String),
    PortOf(String),
    /// The host side of a pair that belongs to a container.
    Container,
    Down,
    Unused,
}

/// Decides about a device that is no pod device.
pub(super) fn choose(link: &Link, facts: &Facts<'_>) -> Choice {
    match refusal(link, facts) {
        Err(refused) => Choice::NotUplink(refused),
        Ok(why) => Choice::Uplink(why),
    }
}

fn refusal(link: &Link, facts: &Facts<'_>) -> Result<Why, WhyNot> {
    if link.loopback {
        return Err(WhyNot::Loopback);
    }
    if link.name == facts.overlay {
        return Err(WhyNot::Overlay);
    }
    let matched = facts.patterns.matches(&link.name);
    if let Match::Excluded(pattern) = matched {
        return Err(WhyNot::Excluded(pattern.to_owned()));
    }
    if link.link_header == LinkHeader::Other {
        return Err(WhyNot::UnknownLinkHeader);
    }
    match matched {
        Match::Named => return Ok(Why::Named),
        Match::NotListed => return Err(WhyNot::NotListed),
        Match::Included(_) | Match::Auto | Match::Excluded(_) => {}
    }
    if let Some(kind @ (InfoKind::Dummy | InfoKind::Ifb | InfoKind::Vrf)) = &link.kind {
        return Err(WhyNot::Virtual(kind.to_string()));
    }
    if let Some(controller) = controller(link, facts.links) {
        return Err(WhyNot::PortOf(controller));
    }
    if let Match::Included(pattern) = matched {
        return Ok(Why::Included(pattern.to_owned()));
    }
    if facts.addresses.iter().any(|address| address.ifindex == link.ifindex) {
        return Ok(Why::Address);
    }
    if link.kind == Some(InfoKind::Veth) {
        return Err(WhyNot::Container);
    }
    if !link.up {
        // the kernel removes IPv6 addresses and routes of a device that goes down; they may be back
        // at once when it comes up, and packets must not pass it without programs
        return if facts.before.contains(&link.ifindex) { Ok(Why::WasUp) } else { Err(WhyNot::Down) };
    }
    if facts.routes.contains(&link.ifindex) { Ok(Why::Route) } else { Err(WhyNot::Unused) }
}

/// The bridge, bond or team that a device is a port of. Not a VRF: packets pass its ports.
fn controller(link: &Link, links: &[Link]) -> Option<String> {
    let index = link.controller?;
    match links.iter().find(|link| link.ifindex == index) {
        Some(controller) if controller.kind == Some(InfoKind::Vrf) => None,
        Some(controller) => Some(controller.name.clone()),
        None => Some(format!("device {index}")),
    }
}

/// Devices that routes to other than link-local destinations lead to, except for the agent's.
pub(super) fn route_devices(routes: &[RouteMessage]) -> BTreeSet<u32> {
    let counts = |route: &&RouteMessage| {
        route.header.kind == RouteType::Unicast
            && route.header.protocol != PROTOCOL
            && read(route).is_some_and(|route| !is_link_local(&route.destination))
    };
    routes.iter().filter(counts).flat_map(devices).collect()
}

fn devices(route: &RouteMessage) -> Vec<u32> {
    let of = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(ifindex) => vec![*ifindex],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    };
    route.attributes.iter().flat_map(of).collect()
}

fn is_link_local(destination: &IpNet) -> bool {
    match destination {
        IpNet::V4(v4) => v4.prefix_len() > 0 && (v4.addr().is_link_local() || v4.addr().is_multicast()),
        IpNet::V6(v6) => {
            v6.prefix_len() > 0 && (v6.addr().is_unicast_link_local() || v6.addr().is_multicast())
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named => f.write_str("named in `uplinks`"),
            Self::Included(pattern) => write!(f, "matches {pattern} in `uplinks`"),
            Self::Address => f.write_str("has an address of the node"),
            Self::Route => f.write_str("routes lead to it"),
            Self::WasUp => f.write_str("was an uplink before it went down"),
        }
    }
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("loopback device"),
            Self::Overlay => f.write_str("the overlay device"),
            Self::UnknownLinkHeader => {
                f.write_str("its link header is not supported: only Ethernet, or none at all")
            }
            Self::Excluded(pattern) => write!(f, "excluded by !{pattern} in `uplinks`"),
            Self::NotListed => f.write_str("not listed in `uplinks`"),
            Self::Virtual(kind) => write!(f, "packets do not leave the node by a {kind} device"),
            Self::PortOf(controller) => write!(f, "port of {controller}"),
            Self::Container => f.write_str("leads to a container, without an address of the node"),
            Self::Down => f.write_str("is down"),
            Self::Unused => f.write_str("has no address, and no route leads to it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteProtocol;

    use super::*;

    fn link(ifindex: u32, name: &str) -> Link {
        Link { ifindex, up: true, carrier: true, ..Link::named(name) }
    }

    fn kind(ifindex: u32, name: &str, kind: InfoKind) -> Link {
        Link { kind: Some(kind), ..link(ifindex, name) }
    }

    fn address(ifindex: u32, network: &str) -> HostAddress {
        HostAddress { ifindex, network: network.parse().unwrap(), global: true, preferred: true }
    }

    /// Which of these devices are uplinks, with the reasons.
    fn chosen(links: &[Link], addresses: &[HostAddress], routes: &[u32], patterns: &str) -> Vec<String> {
        let facts = Facts {
            patterns: &patterns.parse().unwrap(),
            overlay: "dataplane0",
            links,
            addresses,
            routes: &routes.iter().copied().collect(),
            before: &BTreeSet::new(),
        };
        let show = |link: &Link| match choose(link, &facts) {
            Choice::Uplink(why) => format!("+{}: {why}", link.name),
            Choice::NotUplink(why) => format!("-{}: {why}", link.name),
        };
        links.iter().map(show).collect()
    }

    #[test]
    fn devices_with_an_address_or_a_route_are_uplinks() {
        let links = [
            link(2, "eth0"),
            link(3, "eth1"),
            link(4, "eth2"),
            kind(5, "docker0", InfoKind::Bridge),
            Link { link_header: LinkHeader::None, ..kind(6, "wg0", InfoKind::Wireguard) },
        ];
        let addresses = [address(2, "10.0.0.5/24"), address(5, "172.17.0.1/16"), address(6, "10.8.0.5/24")];
        assert_eq!(
            chosen(&links, &addresses, &[3], "auto"),
            [
                "+eth0: has an address of the node",
                "+eth1: routes lead to it",
                "-eth2: has no address, and no route leads to it",
                "+docker0: has an address of the node",
                "+wg0: has an address of the node",
            ]
        );
    }

    #[test]
    fn devices_that_carry_no_traffic_of_the_node_are_no_uplinks() {
        let links = [
            Link { loopback: true, ..link(1, "lo") },
            kind(2, "dataplane0", InfoKind::Vxlan),
            kind(3, "dummy0", InfoKind::Dummy),
            Link { link_header: LinkHeader::Other, ..kind(4, "ppp0", InfoKind::Other("ppp".to_owned())) },
            kind(5, "cali1234", InfoKind::Veth),
            Link { up: false, ..link(6, "eth9") },
        ];
        let addresses: Vec<_> = (1..5).map(|ifindex| address(ifindex, "10.0.0.5/24")).collect();
        assert_eq!(
            chosen(&links, &addresses, &[5], "auto"),
            [
                "-lo: loopback device",
                "-dataplane0: the overlay device",
                "-dummy0: packets do not leave the node by a dummy device",
                "-ppp0: its link header is not supported: only Ethernet, or none at all",
                "-cali1234: leads to a container, without an address of the node",
                "-eth9: is down",
            ]
        );
    }

    #[test]
    fn bridge_or_bond_is_the_uplink_not_its_ports() {
        let links = [
            kind(2, "br0", InfoKind::Bridge),
            Link { controller: Some(2), ..link(3, "eth0") },
            kind(4, "vrf-blue", InfoKind::Vrf),
            Link { controller: Some(4), ..link(5, "eth1") },
        ];
        let addresses = [address(2, "10.0.0.5/24"), address(3, "10.0.0.6/24"), address(5, "10.0.1.5/24")];
        assert_eq!(
            chosen(&links, &addresses, &[], "auto"),
            [
                "+br0: has an address of the node",
                "-eth0: port of br0",
                "-vrf-blue: packets do not leave the node by a vrf device",
                "+eth1: has an address of the node",
            ]
        );
    }

    #[test]
    fn patterns_decide_before_addresses() {
        let links = [
            link(2, "eth0"),
            link(3, "eth1"),
            link(4, "wlan0"),
            Link { controller: Some(2), ..link(5, "eth2") },
        ];
        let addresses = [address(2, "10.0.0.5/24"), address(3, "10.0.1.5/24"), address(4, "10.0.2.5/24")];
        assert_eq!(
            chosen(&links, &addresses, &[], "eth*,!eth1"),
            [
                "+eth0: matches eth* in `uplinks`",
                "-eth1: excluded by !eth1 in `uplinks`",
                "-wlan0: not listed in `uplinks`",
                "-eth2: port of eth0",
            ]
        );
        // a name without * is the operator's decision, whatever the device is
        assert_eq!(chosen(&links[3..], &addresses, &[], "eth2"), ["+eth2: named in `uplinks`"]);
    }

    #[test]
    fn uplink_that_goes_down_stays_one() {
        let links = [Link { up: false, ..link(2, "eth0") }];
        let facts = Facts {
            patterns: &DevicePatterns::default(),
            overlay: "dataplane0",
            links: &links,
            addresses: &[],
            routes: &BTreeSet::new(),
            before: &BTreeSet::from([2]),
        };
        assert_eq!(choose(&links[0], &facts), Choice::Uplink(Why::WasUp));
    }

    #[test]
    fn link_local_multicast_and_agent_routes_do_not_count() {
        use super::super::KernelRoute;
        let route = |destination: &str, ifindex: u32, protocol: RouteProtocol| {
            let mut message =
                super::super::route::message(&KernelRoute::on_link(destination.parse().unwrap(), ifindex))
                    .unwrap();
            message.header.protocol = protocol;
            message
        };
        let routes = [
            route("0.0.0.0/0", 2, RouteProtocol::Static),
            route("10.1.0.0/24", 3, PROTOCOL),
            route("169.254.0.0/16", 4, RouteProtocol::Kernel),
            route("fe80::/64", 5, RouteProtocol::Kernel),
            route("ff00::/8", 6, RouteProtocol::Kernel),
            route("::/0", 7, RouteProtocol::Ra),
            route("10.2.0.0/16", 8, RouteProtocol::Bgp),
        ];
        assert_eq!(route_devices(&routes), BTreeSet::from([2, 7, 8]));
    }
}
