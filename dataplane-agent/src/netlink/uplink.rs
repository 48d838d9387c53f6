//! Uplinks: the devices that carry the node's traffic to and from other machines.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use dataplane_common::abi::MacAddr;
use futures::StreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        link::InfoKind,
        route::{RouteAttribute, RouteMessage},
    },
};

use super::{
    DevicePatterns, HostAddress, KernelRoute, Link, LinkHeader, Netlink, NetlinkError,
    device_choice::{Choice, Facts, WhyNot, choose, route_devices},
    route,
};

/// A destination on the internet of each family, for asking the kernel which source it would
/// choose: the root name server A.
const INTERNET: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 41, 0, 4)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0x503, 0xba3e, 0, 0, 0, 2, 0x30)),
];
/// How many nodes that are not on-link the kernel is asked for its route to.
const ROUTED_NODES: usize = 16;

/// A device that carries the node's traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub name: String,
    pub ifindex: u32,
    pub mtu: u32,
    /// `None`: its frames have no Ethernet header.
    pub mac: Option<MacAddr>,
    /// Addresses of the device with their prefix length, without link-local ones.
    pub addresses: Vec<IpNet>,
    /// Source of translated packets that leave by it, at most one per family.
    pub sources: Vec<IpAddr>,
    /// A bridge has no driver, so it has no native XDP.
    pub bridge: bool,
}

impl Uplink {
    /// Length of the device's longest prefix that holds a next hop; `None`: it is not on-link.
    pub fn reaches(&self, next_hop: IpAddr) -> Option<u8> {
        let networks = self.addresses.iter().filter(|network| network.contains(&next_hop));
        networks.map(IpNet::prefix_len).max()
    }
}

/// The uplink on which a next hop is on-link: of several, the one with the longest prefix, as in
/// the kernel's routes.
pub fn on_link(uplinks: &[Uplink], next_hop: IpAddr) -> Option<&Uplink> {
    let reaching = uplinks.iter().filter_map(|uplink| Some((uplink.reaches(next_hop)?, uplink)));
    // of equals, the first
    reaching.rev().max_by_key(|(bits, _)| *bits).map(|(_, uplink)| uplink)
}

/// Whether a device is an uplink, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceChoice {
    pub name: String,
    pub ifindex: u32,
    pub is_uplink: bool,
    /// Why it is one, or is not: part of a sentence.
    pub reason: String,
}

/// The devices of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeDevices {
    /// Those with an InternalIP of the node first, bridges last.
    pub uplinks: Vec<Uplink>,
    /// Every device, except for those of pods.
    pub choices: Vec<DeviceChoice>,
    /// Host addresses of all devices.
    pub addresses: Vec<HostAddress>,
    /// Pod devices that are down at one end.
    pub down_pods: BTreeSet<u32>,
    /// What of the setting `uplinks` does not fit this node, as sentences.
    pub warnings: Vec<String>,
}

impl Netlink {
    /// The devices of this node. `overlay` names our overlay device, `before` are the indexes of
    /// the uplinks so far.
    pub async fn devices(
        &self,
        patterns: &DevicePatterns,
        internal_ips: &[IpAddr],
        overlay: &str,
        before: &BTreeSet<u32>,
    ) -> Result<NodeDevices, NetlinkError> {
        let (pods, links): (Vec<_>, Vec<_>) = self.links().await?.into_iter().partition(Link::is_pod_device);
        let addresses = self.host_addresses().await?;
        let no_routes = BTreeSet::new();
        let facts =
            Facts { patterns, overlay, links: &links, addresses: &addresses, routes: &no_routes, before };
        // a table with all routes of the internet takes seconds to read: only if a device needs it
        let needs_routes = |link| choose(link, &facts) == Choice::NotUplink(WhyNot::Unused);
        let routes = if links.iter().any(needs_routes) {
            route_devices(&self.route_messages().await?)
        } else {
            BTreeSet::new()
        };
        let facts = Facts { routes: &routes, ..facts };
        let mut devices = NodeDevices {
            down_pods: pods.iter().filter(|link| !link.delivers()).map(|link| link.ifindex).collect(),
            ..NodeDevices::default()
        };
        for link in &links {
            let choice = choose(link, &facts);
            let (is_uplink, reason) = match &choice {
                Choice::Uplink(why) => (true, why.to_string()),
                Choice::NotUplink(why) => (false, why.to_string()),
            };
            if is_uplink {
                devices.uplinks.push(self.uplink(link, &links, &addresses, internal_ips).await?);
            }
            let (name, ifindex) = (link.name.clone(), link.ifindex);
            devices.choices.push(DeviceChoice { name, ifindex, is_uplink, reason });
        }
        devices.uplinks.sort_by_key(|uplink| {
            let has_internal_ip =
                uplink.addresses.iter().any(|network| internal_ips.contains(&network.addr()));
            (!has_internal_ip, uplink.bridge, uplink.ifindex)
        });
        devices.warnings = warnings(patterns, &devices);
        devices.addresses = addresses;
        Ok(devices)
    }

    async fn uplink(
        &self,
        link: &Link,
        links: &[Link],
        addresses: &[HostAddress],
        internal_ips: &[IpAddr],
    ) -> Result<Uplink, NetlinkError> {
        let mut sources = Vec::new();
        for destination in INTERNET {
            let is_loopback = |ifindex| links.iter().any(|link| link.ifindex == ifindex && link.loopback);
            let kernel = self.route_to(destination, Some(link.ifindex)).await?.and_then(|route| route.source);
            // the kernel may answer with the address of any device if this one has none
            let kernel = kernel.filter(|source| {
                internal_ips.contains(source)
                    || addresses.iter().any(|address| {
                        address.ip() == *source
                            && (address.ifindex == link.ifindex || is_loopback(address.ifindex))
                    })
            });
            sources.extend(source(link.ifindex, addresses, internal_ips, kernel, destination.is_ipv4()));
        }
        let on_it = addresses.iter().filter(|address| address.ifindex == link.ifindex);
        Ok(Uplink {
            name: link.name.clone(),
            ifindex: link.ifindex,
            mtu: link.mtu,
            mac: link.mac.filter(|_| link.link_header == LinkHeader::Ethernet),
            addresses: on_it.map(|address| address.network).collect(),
            sources,
            bridge: link.kind == Some(InfoKind::Bridge),
        })
    }

    /// Smallest MTU of the uplinks that lead to other nodes; without other nodes, of the uplinks
    /// with an InternalIP.
    pub async fn node_mtu(
        &self,
        uplinks: &[Uplink],
        internal_ips: &[IpAddr],
        others: &[IpAddr],
    ) -> Result<Option<u32>, NetlinkError> {
        let mut leading: HashMap<u32, u32> = HashMap::new();
        let mut routed = Vec::new();
        for ip in others {
            match on_link(uplinks, *ip) {
                Some(uplink) => drop(leading.insert(uplink.ifindex, uplink.mtu)),
                None => routed.push(*ip),
            }
        }
        for ip in routed.into_iter().take(ROUTED_NODES) {
            let route = self.route_to(ip, None).await?;
            let uplink =
                route.and_then(|route| uplinks.iter().find(|uplink| uplink.ifindex == route.ifindex));
            leading.extend(uplink.map(|uplink| (uplink.ifindex, uplink.mtu)));
        }
        let with_internal_ip = uplinks
            .iter()
            .filter(|uplink| uplink.addresses.iter().any(|network| internal_ips.contains(&network.addr())));
        let smallest = leading.into_values().min();
        let smallest = smallest.or_else(|| with_internal_ip.map(|uplink| uplink.mtu).min());
        Ok(smallest.or_else(|| uplinks.iter().map(|uplink| uplink.mtu).min()))
    }

    /// The kernel's route to a destination, out of a device if one is given; `None`: there is none.
    async fn route_to(
        &self,
        destination: IpAddr,
        ifindex: Option<u32>,
    ) -> Result<Option<KernelRoute>, NetlinkError> {
        let mut request = RouteMessage::default();
        request.header.address_family = route::family(destination);
        request.header.destination_prefix_length = IpNet::from(destination).prefix_len();
        request.attributes.push(RouteAttribute::Destination(destination.into()));
        request.attributes.extend(ifindex.map(RouteAttribute::Oif));
        let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetRoute(request));
        message.header.flags = NLM_F_REQUEST;
        let mut handle = self.handle.clone();
        let failed = |error| NetlinkError::new("find route to", destination, &error);
        let mut answer = handle.request(message).map_err(failed)?;
        while let Some(response) = answer.next().await {
            match response.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message)) => {
                    return Ok(route::read(&message));
                }
                // whatever the reason: the kernel sends no packet there
                NetlinkPayload::Error(_) => return Ok(None),
                _ => {}
            }
        }
        Ok(None)
    }
}

/// The source of translated packets that leave by a device: its InternalIP, else what the kernel
/// chooses, else its first address.
fn source(
    ifindex: u32,
    addresses: &[HostAddress],
    internal_ips: &[IpAddr],
    kernel: Option<IpAddr>,
    is_ipv4: bool,
) -> Option<IpAddr> {
    let on_it = || {
        addresses
            .iter()
            .filter(move |address| address.ifindex == ifindex && address.ip().is_ipv4() == is_ipv4)
    };
    let has = |ip: &&IpAddr| on_it().any(|address| address.ip() == **ip);
    let internal = internal_ips.iter().find(has).copied();
    let first = || on_it().find(|address| address.preferred && address.global).or_else(|| on_it().next());
    internal.or(kernel).or_else(|| first().map(HostAddress::ip))
}

fn warnings(patterns: &DevicePatterns, devices: &NodeDevices) -> Vec<String> {
    let mut warnings = Vec::new();
    for name in patterns.names() {
        match devices.choices.iter().find(|choice| choice.name == name) {
            None => warnings.push(format!("`uplinks` names {name}, which this node does not have")),
            Some(choice) if !choice.is_uplink => {
                warnings.push(format!("`uplinks` names {name}, which cannot be one: {}", choice.reason));
            }
            Some(_) => {}
        }
    }
    if devices.uplinks.is_empty() {
        warnings.push(
            "no device carries traffic of this node: pods reach only pods of this node; check the addresses of \
             its devices, and `uplinks` in the configuration"
                .to_owned(),
        );
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn address(ifindex: u32, network: &str, preferred: bool) -> HostAddress {
        HostAddress { ifindex, network: network.parse().unwrap(), global: true, preferred }
    }

    fn uplink(ifindex: u32, addresses: &[&str]) -> Uplink {
        Uplink {
            name: format!("eth{ifindex}"),
            ifindex,
            mtu: 1_500,
            mac: None,
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            sources: Vec::new(),
            bridge: false,
        }
    }

    #[test]
    fn next_hop_is_on_the_device_with_the_longest_prefix() {
        let uplinks = [
            uplink(2, &["10.0.0.5/8"]),
            uplink(3, &["10.1.0.5/16", "fd00::5/64"]),
            uplink(4, &["10.1.0.6/16"]),
        ];
        let device = |text| on_link(&uplinks, ip(text)).map(|uplink| uplink.ifindex);
        assert_eq!(device("10.1.0.9"), Some(3));
        assert_eq!(device("10.2.0.9"), Some(2));
        assert_eq!(device("fd00::9"), Some(3));
        assert_eq!(device("192.0.2.1"), None);
    }

    #[test]
    fn source_is_the_internal_ip_then_the_kernels_choice_then_the_first_address() {
        let addresses = [
            address(2, "10.0.0.9/24", false),
            address(2, "10.0.0.5/24", true),
            address(2, "10.0.0.6/24", true),
            address(3, "192.168.1.5/24", false),
        ];
        let internal = [ip("10.0.0.6")];
        assert_eq!(source(2, &addresses, &internal, Some(ip("10.0.0.5")), true), Some(ip("10.0.0.6")));
        assert_eq!(source(2, &addresses, &[], Some(ip("10.0.0.9")), true), Some(ip("10.0.0.9")));
        assert_eq!(source(2, &addresses, &[], None, true), Some(ip("10.0.0.5")));
        assert_eq!(source(3, &addresses, &internal, None, true), Some(ip("192.168.1.5")));
        assert_eq!(source(3, &addresses, &internal, None, false), None);
    }
}
