//! Addresses of the host, and notifications of changes of addresses, links and routes.

use std::net::IpAddr;

use futures::{FutureExt as _, StreamExt as _, channel::mpsc::UnboundedReceiver};
use ipnet::IpNet;
use rtnetlink::{
    MulticastGroup, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
        route::RouteMessage,
    },
    sys::SocketAddr,
};
use tokio::task::JoinHandle;

use super::{Netlink, NetlinkError, route};

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddress {
    pub ifindex: u32,
    /// The address with the prefix length of its subnet.
    pub network: IpNet,
    /// Whether the address has global scope, not link or host scope.
    pub global: bool,
    /// Whether new connections may have it as their source: it is not deprecated, tentative,
    /// temporary (IPv6) or secondary (IPv4).
    pub preferred: bool,
}

impl HostAddress {
    pub fn ip(&self) -> IpAddr {
        self.network.addr()
    }
}

/// Which kinds of objects changed. The receiver reads the whole table again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub links: bool,
    pub addresses: bool,
    /// Routes other than those of the agent.
    pub routes: bool,
}

/// A subscription to changes, until it is dropped.
#[derive(Debug)]
pub struct Monitor {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    task: JoinHandle<()>,
}

impl Netlink {
    /// All addresses of all devices. Tentative addresses are included: the datapath delivers to
    /// them as soon as they are announced.
    pub async fn addresses(&self) -> Result<Vec<HostAddress>, NetlinkError> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump("addresses", &request, |message| match message {
            RouteNetlinkMessage::NewAddress(message) => read(&message),
            _ => None,
        })
        .await
    }

    /// Addresses of this host that other hosts can reach: the host addresses of the endpoint table.
    pub async fn host_addresses(&self) -> Result<Vec<HostAddress>, NetlinkError> {
        let mut addresses = self.addresses().await?;
        addresses.retain(|address| reachable(address.ip()));
        Ok(addresses)
    }

    /// Subscribes in the network namespace of the calling thread.
    pub fn monitor() -> Result<Monitor, NetlinkError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _, messages) = new_multicast_connection(&groups).map_err(NetlinkError::Open)?;
        Ok(Monitor { messages, task: tokio::spawn(connection) })
    }
}

impl Monitor {
    /// Waits for the next change, and merges all pending ones into it. `None`: the socket is
    /// closed.
    pub async fn changed(&mut self) -> Option<Change> {
        let mut change = Change::default();
        while change == Change::default() {
            let (message, _) = self.messages.next().await?;
            change.add(&message);
            while let Some(Some((message, _))) = self.messages.next().now_or_never() {
                change.add(&message);
            }
        }
        Some(change)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Change {
    fn add(&mut self, message: &NetlinkMessage<RouteNetlinkMessage>) {
        match &message.payload {
            NetlinkPayload::InnerMessage(message) => self.add_message(message),
            // messages were lost: everything may have changed
            NetlinkPayload::Overrun(_) => *self = Self { links: true, addresses: true, routes: true },
            _ => {}
        }
    }

    fn add_message(&mut self, message: &RouteNetlinkMessage) {
        match message {
            RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => self.links = true,
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => self.addresses = true,
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                self.routes |= !is_agent_route(route);
            }
            _ => {}
        }
    }
}

/// The agent's own routes are not reported: it would react to its own writes without end.
fn is_agent_route(route: &RouteMessage) -> bool {
    route.header.protocol == route::PROTOCOL
}

fn read(message: &AddressMessage) -> Option<HostAddress> {
    let mut ip = None;
    for attribute in &message.attributes {
        match attribute {
            // on point-to-point devices `Address` is the peer's and `Local` the host's; else IPv6
            // has only `Address`
            AddressAttribute::Local(local) => ip = Some(*local),
            AddressAttribute::Address(address) => ip = ip.or(Some(*address)),
            _ => {}
        }
    }
    let failed = message.header.flags.contains(AddressHeaderFlags::Dadfailed);
    // of an IPv6 address, the flag `Secondary` means temporary
    let unpreferred =
        AddressHeaderFlags::Deprecated | AddressHeaderFlags::Tentative | AddressHeaderFlags::Secondary;
    let network = IpNet::new(ip?, message.header.prefix_len).ok()?;
    (!failed).then_some(HostAddress {
        ifindex: message.header.index,
        network,
        global: message.header.scope == AddressScope::Universe,
        preferred: !message.header.flags.intersects(unpreferred),
    })
}

fn reachable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !(v4.is_loopback() || v4.is_link_local() || v4.is_unspecified()),
        IpAddr::V6(v6) => !(v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_link_local_addresses_are_not_host_addresses() {
        for (text, expected) in [
            ("10.1.2.3", true),
            ("fd00::1", true),
            ("127.0.0.1", false),
            ("169.254.1.1", false),
            ("::1", false),
            ("fe80::1", false),
        ] {
            assert_eq!(reachable(text.parse().unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn routes_of_the_agent_are_not_reported() {
        let mut route = RouteMessage::default();
        route.header.protocol = route::PROTOCOL;
        let mut change = Change::default();
        change.add_message(&RouteNetlinkMessage::NewRoute(route.clone()));
        assert_eq!(change, Change::default());
        route.header.protocol = rtnetlink::packet_route::route::RouteProtocol::Static;
        change.add_message(&RouteNetlinkMessage::DelRoute(route));
        assert!(change.routes);
    }
}
