//! The VXLAN device: one for all nodes and both families. The programs set the tunnel key of each
//! packet (collect metadata mode).

use std::net::IpAddr;

use dataplane_common::abi::MacAddr;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVxlan,
    packet_route::link::{InfoData, InfoKind, InfoVxlan},
};

use super::{Link, Netlink, NetlinkError, sysctl};

/// Settings of the VXLAN device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayDevice {
    pub name: String,
    /// UDP port.
    pub port: u16,
    pub mtu: u32,
    /// The same on every node, so that a sender need not know the MAC address of the receiving
    /// node's device.
    pub mac: MacAddr,
}

/// Bytes the tunnel adds to a packet: outer IP, UDP, VXLAN and inner Ethernet header (RFC 7348 §5).
pub const fn overhead(remote: IpAddr) -> u32 {
    let ip = match remote {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    };
    ip + 8 + 8 + 14
}

impl Netlink {
    /// Creates the device or changes it to these settings. A device whose settings the kernel
    /// cannot change is deleted and created again.
    pub async fn ensure_overlay(&self, device: &OverlayDevice) -> Result<Link, NetlinkError> {
        if let Some(link) = self.link(&device.name).await? {
            if link.kind != Some(InfoKind::Vxlan) {
                return Err(overlay_error(
                    device,
                    "a device of this name exists and is not a VXLAN device; remove it, or set another name",
                ));
            }
            if has_fixed_settings(&link, device) {
                return self.configure_overlay(link, device).await;
            }
            tracing::info!(
                device = device.name,
                "VXLAN device differs from the configuration; deleting and creating it again"
            );
            self.delete_link(&link).await?;
        }
        self.add_link(&device.name, vxlan(device)).await?;
        let link = self.link(&device.name).await?;
        let link = link.ok_or_else(|| overlay_error(device, "another process deleted the device"))?;
        self.configure_overlay(link, device).await
    }

    /// Applies the settings that can change while the device is in use.
    async fn configure_overlay(&self, link: Link, device: &OverlayDevice) -> Result<Link, NetlinkError> {
        // before the device is up: it must not send neighbour discovery messages
        sysctl::prepare_device(&device.name).map_err(|error| overlay_error(device, &error.to_string()))?;
        if link.mtu != device.mtu || link.mac != Some(device.mac) || !link.noarp || !link.up {
            let message = LinkUnspec::new_with_index(link.ifindex)
                .mtu(device.mtu)
                .address(device.mac.bytes().to_vec())
                .arp(false)
                .up()
                .build();
            self.set_link("set up device", &link, message).await?;
        }
        self.link(&device.name)
            .await?
            .ok_or_else(|| overlay_error(device, "another process deleted the device"))
    }
}

fn vxlan(device: &OverlayDevice) -> LinkMessageBuilder<LinkVxlan> {
    LinkMessageBuilder::<LinkVxlan>::new(&device.name)
        .collect_metadata(true)
        .port(device.port)
        // the programs are the forwarding table
        .learning(false)
        // senders over IPv6 may omit the outer UDP checksum (RFC 6935); the inner packet has its
        // own
        .udp_zero_csum6_rx(true)
        .mtu(device.mtu)
        .address(device.mac.bytes().to_vec())
        .arp(false)
}

/// Whether the settings match that the kernel can set only when it creates the device.
fn has_fixed_settings(link: &Link, device: &OverlayDevice) -> bool {
    let Some(InfoData::Vxlan(attributes)) = &link.data else { return false };
    [
        InfoVxlan::CollectMetadata(true),
        InfoVxlan::Port(device.port),
        InfoVxlan::Learning(false),
        InfoVxlan::UDPZeroCsumRX(true),
    ]
    .iter()
    .all(|setting| attributes.contains(setting))
}

fn overlay_error(device: &OverlayDevice, detail: &str) -> NetlinkError {
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
    fn vxlan_overhead_is_50_bytes_over_ipv4_and_70_over_ipv6() {
        assert_eq!(overhead("10.0.0.1".parse().unwrap()), 50);
        assert_eq!(overhead("fd00::1".parse().unwrap()), 70);
    }
}
