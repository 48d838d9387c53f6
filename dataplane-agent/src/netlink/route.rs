//! Kernel routes, for packets that the host's network stack sends.
//!
//! The agent's routes have protocol 218 and metric 218. The protocol marks the routes that the
//! agent may remove. The metric protects other routes to the same prefix: the kernel matches
//! `replace` by prefix and metric only.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        RouteNetlinkMessage,
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
            RouteScope, RouteVia,
        },
    },
};

use super::{Neighbour, Netlink, NetlinkError, link::HOST_MAC};

/// Protocol of the agent's routes: a number that `rt_protos` of iproute2 does not assign.
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(218);
const METRIC: u32 = 218;

/// Next hop of the routes to IPv4 cluster IPs. No device has this address: packets to cluster IPs
/// are translated on their way out of the uplink, and never reach it.
const SERVICES_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 218, 218));
/// Next hop of the routes to IPv6 cluster IPs.
const SERVICES_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0xda7a, 0, 0, 0x218));

/// A route in the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelRoute {
    pub destination: IpNet,
    /// Next hop; `None`: the destination is on-link. An IPv4 destination may have an IPv6 next hop.
    pub gateway: Option<IpAddr>,
    pub ifindex: u32,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// MTU of the route, if less than the device's.
    pub mtu: Option<u32>,
}

impl KernelRoute {
    /// A route to a prefix that is on-link.
    pub const fn on_link(destination: IpNet, ifindex: u32) -> Self {
        Self { destination, gateway: None, ifindex, source: None, mtu: None }
    }

    /// A route to a pod of this node, with the address of its family in `sources` (at most one per
    /// family) as preferred source: pod devices have no address, and the kernel would choose one of
    /// any other device.
    pub fn to_pod(pod: IpAddr, ifindex: u32, sources: &[IpAddr]) -> Self {
        let source = sources.iter().find(|source| source.is_ipv4() == pod.is_ipv4()).copied();
        Self { source, ..Self::on_link(pod.into(), ifindex) }
    }

    /// A route to a range of cluster IPs, out of an uplink: packets of the host's processes get
    /// this source and reach the programs whatever other routes the node has, even without a
    /// default route.
    pub fn to_services(range: IpNet, ifindex: u32, source: IpAddr) -> Self {
        let gateway = if range.addr().is_ipv4() { SERVICES_V4 } else { SERVICES_V6 };
        Self { gateway: Some(gateway), source: Some(source), ..Self::on_link(range, ifindex) }
    }

    /// The permanent neighbour that the route needs: its next hop, if no device has that address.
    pub fn neighbour(&self) -> Option<Neighbour> {
        let address = self.gateway.filter(|gateway| [SERVICES_V4, SERVICES_V6].contains(gateway))?;
        Some(Neighbour { ifindex: self.ifindex, address, mac: HOST_MAC })
    }
}

impl fmt::Display for KernelRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.destination)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev {}", self.ifindex)
    }
}

impl Netlink {
    /// Adds a route, or replaces the agent's route to the same prefix.
    pub async fn ensure_route(&self, route: &KernelRoute) -> Result<(), NetlinkError> {
        if let Some(neighbour) = route.neighbour() {
            self.ensure_neighbour(&neighbour).await?;
        }
        let message = message(route).map_err(|detail| NetlinkError::Protocol {
            operation: "add route",
            object: route.to_string(),
            detail,
        })?;
        let request = self.handle.route().add(message).replace();
        request.execute().await.map_err(|error| NetlinkError::new("add route", route, &error))
    }

    /// Removes the agent's route to a prefix, on any device. A missing route is not an error.
    pub async fn remove_route(&self, destination: IpNet) -> Result<(), NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(destination.addr());
        message.header.destination_prefix_length = destination.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = PROTOCOL;
        // any scope
        message.header.scope = RouteScope::NoWhere;
        message.attributes.push(RouteAttribute::Destination(destination.network().into()));
        message.attributes.push(RouteAttribute::Priority(METRIC));
        match self.handle.route().del(message).execute().await {
            Ok(()) => Ok(()),
            Err(error) => match NetlinkError::new("remove route", destination, &error) {
                error if error.errno() == Some(nix::libc::ESRCH) => Ok(()),
                error => Err(error),
            },
        }
    }

    /// All routes of the agent.
    pub async fn agent_routes(&self) -> Result<Vec<KernelRoute>, NetlinkError> {
        let mut routes = Vec::new();
        for message in self.route_messages().await? {
            let own =
                message.header.protocol == PROTOCOL && message.header.table == RouteHeader::RT_TABLE_MAIN;
            routes.extend(own.then(|| read(&message)).flatten());
        }
        Ok(routes)
    }

    /// All routes of both families, of all tables.
    pub(super) async fn route_messages(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let request = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        self.dump("routes", &request, |message| match message {
            RouteNetlinkMessage::NewRoute(route) if !route.header.flags.contains(RouteFlags::Cloned) => {
                Some(route)
            }
            _ => None,
        })
        .await
    }
}

pub(super) fn message(route: &KernelRoute) -> Result<RouteMessage, String> {
    let destination = route.destination;
    let scope = if route.gateway.is_none() && destination.addr().is_ipv4() {
        RouteScope::Link
    } else {
        RouteScope::Universe
    };
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.network(), destination.prefix_len())
        .map_err(|error| error.to_string())?
        .output_interface(route.ifindex)
        .protocol(PROTOCOL)
        .priority(METRIC)
        .scope(scope);
    if let Some(source) = route.source {
        builder = builder.pref_source(source).map_err(|error| error.to_string())?;
    }
    let attributes = &mut builder.get_mut().attributes;
    match (destination.addr(), route.gateway) {
        (_, None) => {}
        (IpAddr::V4(_), Some(IpAddr::V6(gateway))) => {
            attributes.push(RouteAttribute::Via(RouteVia::Inet6(gateway)));
        }
        (IpAddr::V6(_), Some(IpAddr::V4(_))) => {
            return Err("an IPv6 route cannot have an IPv4 next hop".to_owned());
        }
        (_, Some(gateway)) => attributes.push(RouteAttribute::Gateway(gateway.into())),
    }
    if route.neighbour().is_some() {
        builder.get_mut().header.flags.insert(RouteFlags::Onlink);
    }
    let attributes = &mut builder.get_mut().attributes;
    if let Some(mtu) = route.mtu {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    Ok(builder.build())
}

pub(super) fn read(message: &RouteMessage) -> Option<KernelRoute> {
    let unspecified = match message.header.address_family {
        rtnetlink::packet_route::AddressFamily::Inet => IpAddr::from([0; 4]),
        rtnetlink::packet_route::AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut address = unspecified;
    let mut route = KernelRoute::on_link(IpNet::from(unspecified), 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(destination) => address = ip(destination)?,
            RouteAttribute::Gateway(gateway) => route.gateway = ip(gateway),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => route.gateway = Some((*gateway).into()),
            RouteAttribute::PrefSource(source) => route.source = ip(source),
            RouteAttribute::Oif(ifindex) => route.ifindex = *ifindex,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    route.destination = IpNet::new(address, message.header.destination_prefix_length).ok()?;
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

pub(super) fn family(address: IpAddr) -> rtnetlink::packet_route::AddressFamily {
    match address {
        IpAddr::V4(_) => rtnetlink::packet_route::AddressFamily::Inet,
        IpAddr::V6(_) => rtnetlink::packet_route::AddressFamily::Inet6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_route_with_ipv4_next_hop_is_refused() {
        let mut route = KernelRoute::on_link("fd00:1::/64".parse().unwrap(), 2);
        route.gateway = Some("10.0.0.1".parse().unwrap());
        assert!(message(&route).unwrap_err().contains("next hop"));
    }

    #[test]
    fn route_survives_encoding_and_decoding() {
        for (destination, gateway) in [
            ("10.1.0.0/24", None),
            ("10.1.0.0/24", Some("10.0.0.2")),
            ("10.1.0.0/24", Some("fd00::2")),
            ("fd01::/64", Some("fd00::2")),
        ] {
            let route = KernelRoute {
                destination: destination.parse().unwrap(),
                gateway: gateway.map(|gateway| gateway.parse().unwrap()),
                ifindex: 7,
                source: None,
                mtu: Some(1_450),
            };
            assert_eq!(read(&message(&route).unwrap()), Some(route));
        }
    }

    #[test]
    fn next_hop_of_cluster_ips_needs_no_address_on_the_device() {
        for (range, source) in [("10.96.0.0/16", "172.18.0.2"), ("fd96::/108", "fd18::2")] {
            let route = KernelRoute::to_services(range.parse().unwrap(), 7, source.parse().unwrap());
            let message = message(&route).unwrap();
            assert!(message.header.flags.contains(RouteFlags::Onlink));
            assert_eq!(read(&message), Some(route));
            assert_eq!(route.neighbour().map(|neighbour| neighbour.ifindex), Some(7));
        }
    }
}
