//! Addresses of the host, and word of every change of addresses, devices and routes.

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

/// An address on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddress {
    pub ifindex: u32,
    /// The address with the prefix length of its subnet.
    pub network: IpNet,
    /// Global, or only meaningful on the device or the host.
    pub global: bool,
}

impl HostAddress {
    pub fn ip(&self) -> IpAddr {
        self.network.addr()
    }
}

/// What changed since the last look. Which object is not told: whoever asks reads the table anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub links: bool,
    pub addresses: bool,
    /// Routes that are not ours.
    pub routes: bool,
}

/// A subscription to changes. Dropping it ends it.
#[derive(Debug)]
pub struct Monitor {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    task: JoinHandle<()>,
}

impl Netlink {
    /// Every address of every device, tentative ones too: the datapath delivers to them as soon as they are announced.
    pub async fn addresses(&self) -> Result<Vec<HostAddress>, NetlinkError> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump("addresses", &request, |message| match message {
            RouteNetlinkMessage::NewAddress(message) => read(&message),
            _ => None,
        })
        .await
    }

    /// Addresses at which this host can be reached from elsewhere: what the endpoint table calls host addresses.
    pub async fn host_addresses(&self) -> Result<Vec<HostAddress>, NetlinkError> {
        let mut addresses = self.addresses().await?;
        addresses.retain(|address| reachable(address.ip()));
        Ok(addresses)
    }

    /// Starts listening, in the network namespace of the calling thread.
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
    /// Waits for the next change and returns it with all that have gathered. `None`: the socket is closed.
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
            // messages were lost: anything may have changed
            NetlinkPayload::Overrun(_) => *self = Self { links: true, addresses: true, routes: true },
            _ => {}
        }
    }

    fn add_message(&mut self, message: &RouteNetlinkMessage) {
        match message {
            RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => self.links = true,
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => self.addresses = true,
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                self.routes |= !is_ours(route);
            }
            _ => {}
        }
    }
}

/// Word of our own writes would wake us for ever.
fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == route::OURS
}

fn read(message: &AddressMessage) -> Option<HostAddress> {
    let mut ip = None;
    for attribute in &message.attributes {
        match attribute {
            // on a point-to-point device `Address` is the peer's, and `Local` ours; IPv6 has only `Address` elsewhere
            AddressAttribute::Local(local) => ip = Some(*local),
            AddressAttribute::Address(address) => ip = ip.or(Some(*address)),
            _ => {}
        }
    }
    let failed = message.header.flags.contains(AddressHeaderFlags::Dadfailed);
    let network = IpNet::new(ip?, message.header.prefix_len).ok()?;
    (!failed).then_some(HostAddress {
        ifindex: message.header.index,
        network,
        global: message.header.scope == AddressScope::Universe,
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
    fn only_addresses_others_can_use_are_the_hosts() {
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
    fn our_own_routes_are_no_news() {
        let mut route = RouteMessage::default();
        route.header.protocol = route::OURS;
        let mut change = Change::default();
        change.add_message(&RouteNetlinkMessage::NewRoute(route.clone()));
        assert_eq!(change, Change::default());
        route.header.protocol = rtnetlink::packet_route::route::RouteProtocol::Static;
        change.add_message(&RouteNetlinkMessage::DelRoute(route));
        assert!(change.routes);
    }
}
