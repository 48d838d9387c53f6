//! Proves a packet's source before it is believed: a pod sends from its own addresses, another
//! machine not as this node, and the tunnel carries packets between nodes only.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    abi::Addr,
    net::{Icmpv6Type, Protocol, UdpHeader},
    reason::{DropReason, Verdict},
};

use super::neighbour;
use crate::{
    config,
    frame::{Frame, family::IpFamily, packet::Packet},
    global::{PackedResult, global_functions},
    helpers::{is_zero, opaque, skb},
    maps,
};

/// Checks a packet that a pod sent: its source is an address of the pod behind the device, or one
/// that the pod is allowed besides. `Some` ends the run: the packet was neighbour discovery.
///
/// # Errors
/// [`DropReason::SourceNotOwned`], [`DropReason::ConfiguresOthers`].
#[inline(always)]
pub(crate) fn check_pod<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
) -> Result<Option<Verdict>, DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext) -> u32 {
        match try_check_pod::<F>(ctx) {
            Ok(None) => 0,
            Ok(Some(Verdict::NeighbourAnswered)) => 1,
            Ok(Some(_)) => 2,
            Err(DropReason::ConfiguresOthers) => 3,
            Err(_) => 4,
        }
    }
    // by arithmetic: a branch on the protocol would make the verifier follow all code below twice
    let is_other_source = u64::from(!maps::is_pod_source(ctx.ifindex(), &packet.src));
    let is_icmp = is_zero(u32::from(packet.protocol ^ F::ICMP));
    if opaque(is_other_source | is_icmp) == 0 {
        return Ok(None);
    }
    match outlined::<F>(ctx) {
        0 => Ok(None),
        1 => Ok(Some(Verdict::NeighbourAnswered)),
        2 => Ok(Some(Verdict::NeighbourIgnored)),
        3 => Err(DropReason::ConfiguresOthers),
        _ => Err(DropReason::SourceNotOwned),
    }
}

#[inline(always)]
fn try_check_pod<F: IpFamily>(ctx: &TcContext) -> Result<Option<Verdict>, DropReason> {
    let packet = F::parse(ctx)?;
    if let Some(verdict) = neighbour::on_icmp(ctx, &packet)? {
        return Ok(Some(verdict));
    }
    let is_known = match owner(&packet.src) {
        // no address of this node: a pod that routes for others may be allowed to use it
        None => is_allowed::<F>(ctx, &packet.src),
        Some(ifindex) => ifindex == ctx.ifindex(),
    };
    if is_known { Ok(None) } else { Err(DropReason::SourceNotOwned) }
}

/// Whether the pod may use a source that nobody on this node has.
#[inline(always)]
fn is_allowed<F: IpFamily>(ctx: &TcContext, src: &Addr) -> bool {
    !F::is_link_scoped(src) && !src.is_unspecified() && maps::is_allowed_source(ctx.ifindex(), src)
}

/// The host-side device of the pod that has the address, 0 for an address of the host; `None`:
/// nobody on this node has it. No packet arrives on device 0.
#[inline(always)]
fn owner(addr: &Addr) -> Option<u32> {
    maps::endpoint(addr).map(|endpoint| endpoint.ifindex)
}

/// Checks a packet that arrived on an uplink. `Some` ends the run.
///
/// # Errors
/// [`DropReason::LoopbackAddress`], [`DropReason::SourceIsLocal`].
#[inline(always)]
pub(crate) fn check_wire<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
) -> Result<Option<Verdict>, DropReason> {
    if F::is_loopback(&packet.src) || F::is_loopback(&packet.dst) {
        return Err(DropReason::LoopbackAddress);
    }
    if maps::endpoint(&packet.src).is_none() {
        return Ok(None);
    }
    // the kernel must see that another machine claims an address of this node (RFC 4862 §5.4)
    if is_neighbour_advertisement(ctx, packet) {
        return Ok(Some(Verdict::StackLinkLocal));
    }
    Err(DropReason::SourceIsLocal)
}

#[inline(always)]
fn is_neighbour_advertisement<F: IpFamily>(ctx: &impl Frame, packet: &Packet<F>) -> bool {
    packet.protocol == Protocol::ICMPV6
        && packet.icmp_type(ctx).is_some_and(|kind| kind == Icmpv6Type::NEIGHBOUR_ADVERTISEMENT)
}

/// Checks a packet that arrived through the tunnel: its source belongs to the node that sent it. It
/// may lie outside of the cluster in an ICMP error, and (direct server return) in a packet to an
/// address that is not this node's.
///
/// # Errors
/// [`DropReason::TunnelSource`], [`DropReason::SourceIsLocal`], [`DropReason::LoopbackAddress`].
#[inline(always)]
pub(crate) fn check_tunnel<F: IpFamily>(ctx: &TcContext, packet: &Packet<F>) -> Result<(), DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, src: &Addr, dst: &Addr) -> PackedResult {
        try_check_tunnel::<F>(ctx, src, dst).into()
    }
    outlined::<F>(ctx, &packet.src, &packet.dst).unpack().map(|_| ())
}

#[inline(always)]
fn try_check_tunnel<F: IpFamily>(ctx: &TcContext, src: &Addr, dst: &Addr) -> Result<(), DropReason> {
    if F::is_loopback(src) || F::is_loopback(dst) {
        return Err(DropReason::LoopbackAddress);
    }
    let sender = skb::tunnel_sender(ctx)?;
    if sender.vni != config::overlay_vni() {
        return Err(DropReason::TunnelSource);
    }
    if let Some(route) = maps::route(src)
        && route.is_node()
    {
        // a row may name an address of the other family for the same node; then only that a node
        // sent it is known
        let is_sender = route.next_hop == sender.addr
            || (route.next_hop.is_v4() != sender.addr.is_v4() && is_node_address(&sender.addr));
        return if is_sender { Ok(()) } else { Err(DropReason::TunnelSource) };
    }
    if maps::endpoint(src).is_some() {
        return Err(DropReason::SourceIsLocal);
    }
    // an ICMP error may come from any router on a client's path to a node port of the sender
    let may_be_outside = maps::endpoint(dst).is_none() || F::parse(ctx)?.is_icmp_error(ctx);
    if may_be_outside && is_node_address(&sender.addr) { Ok(()) } else { Err(DropReason::TunnelSource) }
}

/// Whether another node has the address, as its `InternalIP`.
#[inline(always)]
fn is_node_address(addr: &Addr) -> bool {
    maps::route(addr).is_some_and(|route| route.is_node() && route.next_hop == *addr)
}

/// Checks a pod's packet to a node or to its own link.
///
/// # Errors
/// [`DropReason::LoopbackAddress`]; [`DropReason::TunnelPort`]; [`DropReason::ConfiguresOthers`]
/// for a DHCP answer (RFC 2131 §4.1, RFC 8415 §7.2).
#[inline(always)]
pub(crate) fn check_to_node<F: IpFamily>(ctx: &TcContext) -> Result<(), DropReason> {
    PackedResult::from_raw(call_check_to_node::<F>(ctx)).unpack().map(|_| ())
}

global_functions! {
    call_check_to_node: check_to_node_v4, check_to_node_v6 = run_without_scratch(try_check_to_node);
}

#[inline(always)]
fn try_check_to_node<F: IpFamily>(ctx: &TcContext) -> Result<(), DropReason> {
    const DHCP: [(u16, u16); 2] = [(67, 68), (547, 546)];
    let packet = F::parse(ctx)?;
    if F::is_loopback(&packet.dst) {
        return Err(DropReason::LoopbackAddress);
    }
    if packet.protocol != Protocol::UDP || !packet.has_transport() {
        return Ok(());
    }
    let udp: UdpHeader = ctx.read(packet.l4)?;
    if udp.dst_port() == config::overlay_port() {
        return Err(DropReason::TunnelPort);
    }
    let ports = (udp.src_port().get(), udp.dst_port().get());
    if ports == DHCP[0] || ports == DHCP[1] {
        return Err(DropReason::ConfiguresOthers);
    }
    Ok(())
}
