//! The node that most tests use: two pods, the host, two other nodes (one with native routing, one
//! through the overlay), services.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use dataplane_common::{
    abi::{NodeConfig, RouteKind},
    net::Protocol,
};

use super::rig::{OVERLAY_NODE, Rig, per_packet_udp};

/// The IP family; tests run for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

/// Addresses of one family.
#[derive(Clone, Copy, Debug)]
pub struct World {
    /// Pods of this node with the devices 11 and 12.
    pub pod: IpAddr,
    pub other_pod: IpAddr,
    /// An address of this node's pod CIDR that no pod has.
    pub unassigned: IpAddr,
    pub host: IpAddr,
    /// A pod of a node reached by native routing, and that node.
    pub wire_pod: IpAddr,
    pub wire_node: IpAddr,
    /// A pod of a node reached through the overlay.
    pub overlay_pod: IpAddr,
    /// That node, as the tunnel knows it.
    pub overlay_node: IpAddr,
    pub outside: IpAddr,
    /// An outside address in a range excepted from masquerade.
    pub exempt: IpAddr,
    /// TCP, UDP and SCTP 80: one backend, `wire_pod` 8080 (slot 0).
    pub service: SocketAddr,
    /// TCP, UDP and SCTP 81: one backend, `pod` 8080 (slot 1).
    pub own_service: SocketAddr,
    /// TCP, UDP and SCTP 82: no backend.
    pub empty_service: SocketAddr,
}

pub const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 11];
pub const OTHER_POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 12];

impl World {
    pub fn new(family: Family) -> Self {
        let ip = |v4: &str, v6: &str| -> IpAddr {
            match family {
                Family::V4 => v4.parse().expect("an IPv4 address"),
                Family::V6 => v6.parse().expect("an IPv6 address"),
            }
        };
        let service = ip("10.96.0.10", "fd00:96::10");
        Self {
            pod: ip("10.1.0.2", "fd00:10:0::2"),
            other_pod: ip("10.1.0.3", "fd00:10:0::3"),
            unassigned: ip("10.1.0.99", "fd00:10:0::99"),
            host: ip("172.18.0.2", "fd00:18::2"),
            wire_pod: ip("10.1.1.5", "fd00:10:1::5"),
            wire_node: ip("172.18.0.3", "fd00:18::3"),
            overlay_pod: ip("10.1.2.5", "fd00:10:2::5"),
            overlay_node: OVERLAY_NODE.into(),
            outside: ip("192.0.2.1", "2001:db8:ffff::1"),
            exempt: ip("198.51.100.7", "2001:db8:eeee::7"),
            service: SocketAddr::new(service, 80),
            own_service: SocketAddr::new(service, 81),
            empty_service: SocketAddr::new(service, 82),
        }
    }

    /// Writes its rows, without flow hints.
    pub fn fill(&self, rig: &mut Rig) -> Result<()> {
        rig.pod(self.pod, 11, POD_MAC)?;
        rig.pod(self.other_pod, 12, OTHER_POD_MAC)?;
        rig.host(self.host)?;
        let (pods, node) = if self.pod.is_ipv4() { (24, 32) } else { (64, 128) };
        rig.route((self.unassigned, pods), RouteKind::Local, None, 0)?;
        rig.route((self.wire_pod, pods), RouteKind::Native, Some(self.wire_node), 1_500)?;
        rig.route((self.wire_node, node), RouteKind::Native, Some(self.wire_node), 1_500)?;
        rig.route((self.overlay_pod, pods), RouteKind::Overlay, Some(self.overlay_node), 1_450)?;
        rig.route((self.overlay_node, 32), RouteKind::Overlay, Some(self.overlay_node), 1_450)?;
        rig.route((self.exempt, node), RouteKind::NoMasquerade, None, 0)?;
        // the backends of both families must not share slots
        let base = if self.pod.is_ipv4() { 0 } else { 100 };
        for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
            rig.service(self.service, protocol, base, &[SocketAddr::new(self.wire_pod, 8080)], 0)?;
            rig.service(self.own_service, protocol, base + 1, &[SocketAddr::new(self.pod, 8080)], 0)?;
            rig.service(self.empty_service, protocol, base + 2, &[], 0)?;
        }
        Ok(())
    }

    /// ID of the backend of `service`.
    pub fn backend(&self) -> u32 {
        if self.pod.is_ipv4() { 0 } else { 100 }
    }
}

/// A rig for a node of both families, and the addresses of one of them.
///
/// # Errors
/// Loading fails without root.
pub fn rig(family: Family) -> Result<(Rig, World)> {
    rig_with(family, &per_packet_udp())
}

/// As [`rig`], with another configuration.
pub fn rig_with(family: Family, node: &NodeConfig) -> Result<(Rig, World)> {
    let (v4, v6) = (World::new(Family::V4), World::new(Family::V6));
    let mut rig = Rig::new(node, v4.host, v6.host)?;
    v4.fill(&mut rig)?;
    v6.fill(&mut rig)?;
    Ok((rig, World::new(family)))
}

/// Shorthand for [`SocketAddr::new`].
pub fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}
