//! The VXLAN device. One for all nodes and both families: the programs say per packet where it goes (collect metadata).

use std::net::IpAddr;

use dataplane_common::abi::MacAddr;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVxlan,
    packet_route::link::{InfoData, InfoKind, InfoVxlan},
};

use super::{Link, Netlink, NetlinkError, sysctl};

/// What the device is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayDevice {
    pub name: String,
    /// UDP port.
    pub port: u16,
    pub mtu: u32,
    /// The same on every node, so that a frame for a node's own stack is to its device whichever node sent it.
    pub mac: MacAddr,
}

/// Bytes the tunnel adds to a packet: outer IP, UDP, VXLAN and inner Ethernet header (RFC 7348 §5).
pub const fn overhead(tunnel_end: IpAddr) -> u32 {
    let ip = match tunnel_end {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    };
    ip + 8 + 8 + 14
}

impl Netlink {
    /// Makes sure of the device: creates it, mends it, or makes it anew where the kernel cannot change it.
    pub async fn ensure_overlay(&self, device: &OverlayDevice) -> Result<Link, NetlinkError> {
        if let Some(link) = self.link(&device.name).await? {
            if link.kind != Some(InfoKind::Vxlan) {
                return Err(wrong(
                    device,
                    "there is a device of this name that is no VXLAN: choose another name",
                ));
            }
            if as_wanted(&link, device) {
                return self.mend_overlay(link, device).await;
            }
            tracing::info!(device = device.name, "VXLAN device is not as configured: made anew");
            self.delete_link(&link).await?;
        }
        self.add_link(&device.name, new(device)).await?;
        let link = self.link(&device.name).await?;
        let link = link.ok_or_else(|| wrong(device, "the device is gone the moment it was made"))?;
        self.mend_overlay(link, device).await
    }

    /// What can be changed while the device is at work.
    async fn mend_overlay(&self, link: Link, device: &OverlayDevice) -> Result<Link, NetlinkError> {
        // before the device comes up, or it announces itself by neighbour discovery
        sysctl::prepare_device(&device.name).map_err(|error| wrong(device, &error.to_string()))?;
        if link.mtu != device.mtu || link.mac != Some(device.mac) || !link.noarp || !link.up {
            let message = LinkUnspec::new_with_index(link.ifindex)
                .mtu(device.mtu)
                .address(device.mac.bytes().to_vec())
                .arp(false)
                .up()
                .build();
            self.set_link("set up device", &link, message).await?;
        }
        self.link(&device.name).await?.ok_or_else(|| wrong(device, "the device went while it was set up"))
    }
}

fn new(device: &OverlayDevice) -> LinkMessageBuilder<LinkVxlan> {
    LinkMessageBuilder::<LinkVxlan>::new(&device.name)
        .collect_metadata(true)
        .port(device.port)
        // the programs are the forwarding table
        .learning(false)
        // a sender over IPv6 may leave the outer checksum out (RFC 6935); the inner one stays
        .udp_zero_csum6_rx(true)
        .mtu(device.mtu)
        .address(device.mac.bytes().to_vec())
        .arp(false)
}

/// What the kernel fixes when the device is made.
fn as_wanted(link: &Link, device: &OverlayDevice) -> bool {
    let Some(InfoData::Vxlan(attributes)) = &link.data else { return false };
    [
        InfoVxlan::CollectMetadata(true),
        InfoVxlan::Port(device.port),
        InfoVxlan::Learning(false),
        InfoVxlan::UDPZeroCsumRX(true),
    ]
    .iter()
    .all(|wanted| attributes.contains(wanted))
}

fn wrong(device: &OverlayDevice, detail: &str) -> NetlinkError {
    NetlinkError::Protocol {
        operation: "set up overlay device",
        object: device.name.clone(),
        detail: detail.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tunnel_costs_fifty_bytes_over_ipv4_and_seventy_over_ipv6() {
        assert_eq!(overhead("10.0.0.1".parse().unwrap()), 50);
        assert_eq!(overhead("fd00::1".parse().unwrap()), 70);
    }
}
