//! The node's network: uplinks, overlay device, addresses, and the constants of the programs.
//!
//! Derived from the configuration, the Node object and netlink. A plain value: two plans are equal
//! if no network change matters to the datapath. Changes no program and no table.

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_common::{
    abi::{Addr, ClusterRange, MacAddr, NodeConfig, NodeFlags, NodeVariables, Port},
    netns,
};

use ipnet::IpNet;

use super::egress::{Addresses, EgressPlan};
use crate::{
    compile::routes::Overlay,
    config::{Config, Routing},
    netlink::{
        DeviceChoice, HostAddress, Netlink, NetlinkError, OverlayDevice, SysctlError, Uplink, link::HOST_MAC,
        overlay::overhead, sysctl, xfrm::ipsec_policies,
    },
    state::Node,
};

/// MAC address of the overlay device, the same on every node: no neighbour entries are needed for
/// it.
const OVERLAY_MAC: MacAddr = MacAddr::new([0x0e, 0xda, 0x7a, 0, 0, 2]);
/// MTU of pods on a node without uplinks.
const DEFAULT_MTU: u32 = 1_500;

/// The node's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeNetworkPlan {
    /// This node's Node object.
    pub node: Node,
    /// Devices that carry the node's traffic; those with an InternalIP first.
    pub uplinks: Vec<Uplink>,
    /// Every device, with the reason why it is an uplink or not.
    pub choices: Vec<DeviceChoice>,
    /// What of the setting `uplinks` does not fit this node.
    pub warnings: Vec<String>,
    /// Sysctls of the operator that break the datapath.
    pub sysctl_problems: Vec<String>,
    /// Pod devices that are down.
    pub down_pods: BTreeSet<u32>,
    pub overlay: Option<Overlay>,
    /// Name of the overlay device.
    pub overlay_device: String,
    /// Every address of the host.
    pub addresses: Vec<IpAddr>,
    pub primary_ips: PrimaryIps,
    pub egress: EgressPlan,
    /// Configured MTU of pods.
    mtu: Option<u32>,
    /// Smallest MTU of the uplinks to other nodes.
    node_mtu: u32,
}

/// The node's primary addresses, at most one per family. Masqueraded packets have them as their
/// source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PrimaryIps {
    ipv4: Option<IpAddr>,
    ipv6: Option<IpAddr>,
}

/// Error while the node's network is set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetupError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

impl NodeNetworkPlan {
    /// Sets the node's sysctls, creates the overlay device, and returns the resulting plan.
    ///
    /// `others` are the other nodes, `before` the indexes of the uplinks so far.
    pub(super) async fn set_up(
        config: &Config,
        node: &Node,
        others: &[&Node],
        before: &BTreeSet<u32>,
        netlink: &Netlink,
    ) -> Result<Self, SetupError> {
        let devices =
            netlink.devices(&config.uplinks, &node.internal_ips, &config.vxlan.device, before).await?;
        let uplinks = devices.uplinks;
        let names: Vec<&str> = uplinks.iter().map(|uplink| uplink.name.as_str()).collect();
        for change in sysctl::prepare_node(&names, &config.vxlan.device)? {
            tracing::info!("set sysctl {} from {} to {}", change.key, change.from, change.to);
        }
        let other_ips: Vec<IpAddr> =
            others.iter().flat_map(|other| other.internal_ips.iter().copied()).collect();
        let node_mtu =
            netlink.node_mtu(&uplinks, &node.internal_ips, &other_ips).await?.unwrap_or(DEFAULT_MTU);
        let overlay = overlay(config, node, node_mtu, netlink).await?;
        let primary_ips = PrimaryIps {
            ipv4: primary_ip(node, &uplinks, IpAddr::is_ipv4),
            ipv6: primary_ip(node, &uplinks, IpAddr::is_ipv6),
        };
        let mut addresses: Vec<IpAddr> = devices.addresses.iter().map(HostAddress::ip).collect();
        addresses.sort_unstable();
        addresses.dedup();
        let egress = egress(config, node, others, primary_ips).await?;
        let overlay_device = config.vxlan.device.clone();
        let (node, mtu) = (node.clone(), config.mtu);
        Ok(Self {
            node,
            uplinks,
            choices: devices.choices,
            warnings: devices.warnings,
            sysctl_problems: sysctl::problems()?,
            down_pods: devices.down_pods,
            overlay,
            overlay_device,
            addresses,
            primary_ips,
            egress,
            mtu,
            node_mtu,
        })
    }

    /// In the form that the programs read.
    pub(super) fn variables(&self, cluster: [ClusterRange; 2]) -> NodeVariables {
        let address = |ip: Option<IpAddr>| ip.map_or(Addr::UNSPECIFIED, Addr::from);
        let [cluster_ipv4, cluster_ipv6] = cluster;
        NodeVariables {
            ipv4: address(self.primary_ips.ipv4),
            ipv6: address(self.primary_ips.ipv6),
            cluster_ipv4,
            cluster_ipv6,
            egress_stack: u32::from(self.egress.stack),
        }
    }

    /// MTU of pods: the configured one, else the largest that reaches every other node without
    /// fragmentation.
    pub(super) fn pod_mtu(&self, overlay_used: bool) -> u32 {
        let tunnel = self.overlay.filter(|_| overlay_used).map_or(self.node_mtu, |overlay| overlay.mtu);
        self.mtu.unwrap_or(tunnel)
    }
}

impl PrimaryIps {
    pub(super) fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.into_iter().chain(self.ipv6)
    }
}

/// The load-time constants of the programs.
pub(super) fn constants(config: &Config) -> NodeConfig {
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    NodeConfig {
        host_mac: HOST_MAC,
        overlay_mac: OVERLAY_MAC,
        overlay_vni: config.vxlan.vni,
        overlay_port: Port::new(if config.routing == Routing::Native { 0 } else { config.vxlan.port }),
        reserved: 0,
        snat_first: Port::new(*config.masquerade.ports.start()),
        snat_last: Port::new(*config.masquerade.ports.end()),
        // set by the loader
        flow_slots: 0,
        flags: flag(config.connect_time.tcp, NodeFlags::CONNECT_TCP)
            | flag(config.connect_time.udp, NodeFlags::CONNECT_UDP)
            | flag(config.masquerade.enabled, NodeFlags::MASQUERADE)
            | flag(config.services.ping, NodeFlags::ANSWER_PING)
            | flag(config.node_ports.loopback, NodeFlags::LOOPBACK_NODE_PORTS),
        // 0 if unknown: then processes of the host cannot reach host ports of pods
        host_netns: netns::cookie().unwrap_or(0).to_ne_bytes(),
        mark: config.mark,
    }
}

/// The way of packets between pods and machines outside of the cluster.
async fn egress(
    config: &Config,
    node: &Node,
    others: &[&Node],
    primary_ips: PrimaryIps,
) -> Result<EgressPlan, NetlinkError> {
    let other_pods: Vec<IpNet> = others.iter().flat_map(|other| other.pod_cidrs.iter().copied()).collect();
    let nodes = others.iter().copied().chain([node]).flat_map(|node| node.internal_ips.iter().copied());
    let masquerade = primary_ips.iter().filter(|_| config.masquerade.enabled);
    let addresses = Addresses {
        own_pods: &node.pod_cidrs,
        other_pods: &other_pods,
        nodes: &nodes.collect::<Vec<_>>(),
        masquerade: &masquerade.collect::<Vec<_>>(),
    };
    Ok(EgressPlan::new(config.egress, &ipsec_policies().await?, addresses))
}

/// Creates the overlay device, unless the routing mode is native.
async fn overlay(
    config: &Config,
    node: &Node,
    node_mtu: u32,
    netlink: &Netlink,
) -> Result<Option<Overlay>, SetupError> {
    if config.routing == Routing::Native {
        return Ok(None);
    }
    // IPv4 is preferred for the tunnel, as in `compile::routes`
    let tunnel_ip = node.internal_ips.iter().min_by_key(|ip| ip.is_ipv6());
    let Some(tunnel_ip) = tunnel_ip else { return Ok(None) };
    let mtu = node_mtu.saturating_sub(overhead(*tunnel_ip));
    let device =
        OverlayDevice { name: config.vxlan.device.clone(), port: config.vxlan.port, mtu, mac: OVERLAY_MAC };
    let link = netlink.ensure_overlay(&device).await?;
    Ok(Some(Overlay { ifindex: link.ifindex, mtu: link.mtu }))
}

/// The first InternalIP of a family, else the source address of the first uplink that has one.
fn primary_ip(node: &Node, uplinks: &[Uplink], family: fn(&IpAddr) -> bool) -> Option<IpAddr> {
    let internal = node.internal_ips.iter().copied().find(family);
    internal.or_else(|| uplinks.iter().flat_map(|uplink| &uplink.sources).copied().find(family))
}
