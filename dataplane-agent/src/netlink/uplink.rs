//! Uplinks: the devices that connect this node to other nodes.

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_common::abi::MacAddr;
use ipnet::IpNet;
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};

use super::{HostAddress, Link, Netlink, NetlinkError};

/// How uplinks are chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Uplinks {
    /// The devices with an `InternalIP` of the node; if there is none, the device of the default
    /// route.
    #[default]
    Auto,
    /// The devices with these names.
    Named(Vec<String>),
}

/// A device that connects this node to other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub name: String,
    pub ifindex: u32,
    pub mtu: u32,
    /// `None`: not an Ethernet device; the datapath does not support it.
    pub mac: Option<MacAddr>,
    /// Addresses of the device with their prefix length, without link-local ones.
    pub addresses: Vec<IpNet>,
}

impl Uplink {
    /// Whether a next hop is on-link on this device.
    pub fn reaches(&self, next_hop: IpAddr) -> bool {
        self.addresses.iter().any(|network| network.contains(&next_hop))
    }
}

/// Why the uplinks could not be determined.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    #[error("uplinks: device {0} does not exist; correct `uplinks` in the configuration")]
    NoDevice(String),
    #[error("uplinks: no device has one of the node's addresses ({}), and there is no default route", list(.0))]
    NotFound(Vec<IpAddr>),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

impl Netlink {
    /// The uplinks of this node. `exclude` names a device that is never an uplink: the overlay
    /// device.
    pub async fn uplinks(
        &self,
        choice: &Uplinks,
        internal_ips: &[IpAddr],
        exclude: &str,
    ) -> Result<Vec<Uplink>, UplinkError> {
        let mut links = self.links().await?;
        links.retain(|link| link.name != exclude);
        let addresses = self.host_addresses().await?;
        let chosen = match choice {
            Uplinks::Named(names) => named(&links, names)?,
            Uplinks::Auto => {
                let mut chosen = with_address(&links, &addresses, internal_ips);
                if chosen.is_empty() {
                    chosen = with_default_route(&links, &self.route_messages().await?);
                }
                chosen
            }
        };
        if chosen.is_empty() {
            return Err(UplinkError::NotFound(internal_ips.to_vec()));
        }
        Ok(chosen.into_iter().map(|link| uplink(link, &addresses)).collect())
    }
}

fn named<'a>(links: &'a [Link], names: &[String]) -> Result<Vec<&'a Link>, UplinkError> {
    let find = |name: &String| {
        links.iter().find(|link| link.name == *name).ok_or_else(|| UplinkError::NoDevice(name.clone()))
    };
    names.iter().map(find).collect()
}

/// Without loopback: a node may have its address there and announce it by a routing protocol.
fn with_address<'a>(links: &'a [Link], addresses: &[HostAddress], internal_ips: &[IpAddr]) -> Vec<&'a Link> {
    let indexes: BTreeSet<u32> = addresses
        .iter()
        .filter(|address| internal_ips.contains(&address.ip()))
        .map(|address| address.ifindex)
        .collect();
    links.iter().filter(|link| indexes.contains(&link.ifindex) && !link.loopback).collect()
}

fn with_default_route<'a>(links: &'a [Link], routes: &[RouteMessage]) -> Vec<&'a Link> {
    let best = routes
        .iter()
        .filter(|route| {
            route.header.destination_prefix_length == 0
                && route.header.kind == RouteType::Unicast
                && route.header.table == RouteHeader::RT_TABLE_MAIN
        })
        .filter_map(|route| Some((metric(route), device(route)?)))
        .min();
    best.and_then(|(_, ifindex)| links.iter().find(|link| link.ifindex == ifindex)).into_iter().collect()
}

fn metric(route: &RouteMessage) -> u32 {
    let priority = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    };
    route.attributes.iter().find_map(priority).unwrap_or(0)
}

fn device(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(ifindex) => Some(*ifindex),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

fn uplink(link: &Link, addresses: &[HostAddress]) -> Uplink {
    let on_it = addresses.iter().filter(|address| address.ifindex == link.ifindex);
    Uplink {
        name: link.name.clone(),
        ifindex: link.ifindex,
        mtu: link.mtu,
        mac: link.mac,
        addresses: on_it.map(|address| address.network).collect(),
    }
}

fn list(ips: &[IpAddr]) -> String {
    ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
