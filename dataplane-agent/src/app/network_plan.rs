//! What this node is to be: the devices its programs run on, its addresses, and the constants of its programs.
//!
//! Made from the configuration, the node's own object and what netlink finds; compared as a value, so that whoever
//! holds one knows whether a change of the network means anything. Touches no program and no table.

use std::net::IpAddr;

use dataplane_common::{
    abi::{Addr, ClusterRange, MacAddr, NodeAddresses, NodeConfig, NodeFlags, Port},
    netns,
};

use crate::{
    compile::routes::Overlay,
    config::{Config, Routing},
    netlink::{
        HostAddress, Netlink, NetlinkError, OverlayDevice, SysctlError, Uplink, UplinkError, link::HOST_MAC,
        overlay::overhead, sysctl,
    },
    state::Node,
};

/// Link address of the overlay device on every node: a frame for a node's stack is right wherever it came from.
const OVERLAY_MAC: MacAddr = MacAddr::new([0x0e, 0xda, 0x7a, 0, 0, 2]);
/// Slots a new flow examines before it is refused.
const FLOW_PROBES: u32 = 8;

/// The node's network as it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeNetworkPlan {
    /// The node's own object.
    pub own: Node,
    pub uplinks: Vec<Uplink>,
    pub overlay: Option<Overlay>,
    /// Name of the overlay device.
    pub overlay_device: String,
    /// Every address of the host.
    pub addresses: Vec<IpAddr>,
    /// Those it is known by.
    pub known_by: PrimaryIps,
    /// Of pods, if somebody chose it.
    mtu: Option<u32>,
}

/// The addresses a node is known by, at most one per family: what masqueraded packets come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PrimaryIps {
    ipv4: Option<IpAddr>,
    ipv6: Option<IpAddr>,
}

/// Why the node's network is not as it is to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetupError {
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("uplink {0} is no Ethernet device: the programs cannot run on it")]
    NotEthernet(String),
}

impl NodeNetworkPlan {
    /// Makes the node's devices and switches as they are to be, and says what they are.
    pub(super) async fn make(config: &Config, own: &Node, netlink: &Netlink) -> Result<Self, SetupError> {
        let uplinks = netlink.uplinks(&config.uplinks, &own.internal_ips, &config.vxlan.device).await?;
        if let Some(uplink) = uplinks.iter().find(|uplink| uplink.mac.is_none()) {
            return Err(SetupError::NotEthernet(uplink.name.clone()));
        }
        let names: Vec<&str> = uplinks.iter().map(|uplink| uplink.name.as_str()).collect();
        for change in sysctl::prepare_node(&names)? {
            tracing::info!(key = change.key, from = change.from, to = change.to, "sysctl");
        }
        let overlay = overlay(config, own, &uplinks, netlink).await?;
        let host = netlink.host_addresses().await?;
        let known_by = PrimaryIps {
            ipv4: own_address(own, &uplinks, IpAddr::is_ipv4),
            ipv6: own_address(own, &uplinks, IpAddr::is_ipv6),
        };
        let mut addresses: Vec<IpAddr> = host.iter().map(HostAddress::ip).collect();
        addresses.sort_unstable();
        addresses.dedup();
        let overlay_device = config.vxlan.device.clone();
        Ok(Self { own: own.clone(), uplinks, overlay, overlay_device, addresses, known_by, mtu: config.mtu })
    }

    /// Largest packet of a pod that reaches every other node unfragmented, by the ways `overlay_used` tells of.
    pub(super) fn pod_mtu(&self, overlay_used: bool) -> u32 {
        let uplink = smallest_mtu(&self.uplinks);
        let tunnel = self.overlay.filter(|_| overlay_used).map_or(uplink, |overlay| overlay.mtu);
        self.mtu.unwrap_or(tunnel)
    }
}

impl PrimaryIps {
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.into_iter().chain(self.ipv6)
    }

    /// As the programs read them.
    pub(super) fn for_programs(&self, cluster: [ClusterRange; 2]) -> NodeAddresses {
        let address = |ip: Option<IpAddr>| ip.map_or(Addr::UNSPECIFIED, Addr::from);
        let [cluster_ipv4, cluster_ipv6] = cluster;
        NodeAddresses { ipv4: address(self.ipv4), ipv6: address(self.ipv6), cluster_ipv4, cluster_ipv6 }
    }
}

/// Constants of the programs, as they read them.
pub(super) fn constants(config: &Config) -> NodeConfig {
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    NodeConfig {
        host_mac: HOST_MAC,
        overlay_mac: OVERLAY_MAC,
        overlay_vni: config.vxlan.vni,
        snat_first: Port::new(*config.masquerade.ports.start()),
        snat_last: Port::new(*config.masquerade.ports.end()),
        // the loader sets it
        flow_slots: 0,
        flags: flag(config.connect_time.tcp, NodeFlags::CONNECT_TCP)
            | flag(config.connect_time.udp, NodeFlags::CONNECT_UDP)
            | flag(config.masquerade.enabled, NodeFlags::MASQUERADE)
            | flag(config.node_ports.loopback, NodeFlags::LOOPBACK_NODE_PORTS),
        flow_probes: FLOW_PROBES,
        // without it, no process of the host reaches a port of the host that leads to a pod
        host_netns: netns::cookie().unwrap_or(0).to_ne_bytes(),
    }
}

/// The overlay device, unless the routing mode has none.
async fn overlay(
    config: &Config,
    own: &Node,
    uplinks: &[Uplink],
    netlink: &Netlink,
) -> Result<Option<Overlay>, SetupError> {
    if config.routing == Routing::Native {
        return Ok(None);
    }
    // over IPv4 if this node can: as `compile::routes` chooses the ends
    let end = own.internal_ips.iter().min_by_key(|ip| ip.is_ipv6());
    let Some(end) = end else { return Ok(None) };
    let mtu = smallest_mtu(uplinks).saturating_sub(overhead(*end));
    let device =
        OverlayDevice { name: config.vxlan.device.clone(), port: config.vxlan.port, mtu, mac: OVERLAY_MAC };
    let link = netlink.ensure_overlay(&device).await?;
    Ok(Some(Overlay { ifindex: link.ifindex, mtu: link.mtu }))
}

/// The address of a family this node is known by, else one of an uplink.
fn own_address(own: &Node, uplinks: &[Uplink], family: fn(&IpAddr) -> bool) -> Option<IpAddr> {
    let known = own.internal_ips.iter().copied().find(family);
    known.or_else(|| uplinks.iter().flat_map(|uplink| &uplink.addresses).map(ipnet::IpNet::addr).find(family))
}

fn smallest_mtu(uplinks: &[Uplink]) -> u32 {
    uplinks.iter().map(|uplink| uplink.mtu).min().unwrap_or(1_500)
}
