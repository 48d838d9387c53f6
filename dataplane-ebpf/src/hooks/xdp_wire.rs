//! A packet arrives from another machine: XDP of an uplink, in its driver.
//!
//! A packet from outside to a frontend of this node whose backend is on another node, and the reply
//! from there, is sent back out of the same device (`XDP_TX`) before the kernel allocates an
//! `sk_buff`. Everything else goes on to [`FromWire`](super::FromWire), which does the same: both
//! look up and create the same flows, so a connection may move between them at any packet.

use aya_ebpf::programs::XdpContext;
use dataplane_common::{
    abi::{CachedNextHop, MacAddr},
    net::{EthHeader, Protocol, SctpHeader},
    reason::{DropReason, HookId, Verdict},
};

use super::driver::Hook;
use crate::{
    frame::{
        Frame, L3,
        family::IpFamily,
        packet::{Fragment, Packet},
        with_header,
    },
    helpers::fib::{self, NextHop},
    maps,
    scratch::Scratch,
    stages::{
        nat, next_hop, on_miss, rewrite,
        route::{self, Destination, Origin},
    },
};

pub(crate) struct XdpWire;

impl Hook for XdpWire {
    type Context = XdpContext;

    const ID: HookId = HookId::XdpWire;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &XdpContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        if !is_supported(ctx, &packet) {
            return Ok(Verdict::LeftToTc);
        }
        // node ports, and answers to what they sent on
        if packet.dst == F::node_address() && find_cached(ctx, &packet, scratch) {
            return forward_by_cached(ctx, &packet, scratch);
        }
        let destination = route::lookup(&packet.dst)?;
        scratch.frontend_query = destination.frontend_query(Origin::Outside);
        let may_have_flow = match destination {
            Destination::Host(_) => destination.may_have_flow(ctx, &packet),
            Destination::Outside { .. } | Destination::ServiceRange => packet.link_scoped(ctx).is_none(),
            _ => false,
        };
        if !may_have_flow {
            return Ok(Verdict::LeftToTc);
        }
        // tc drops those with a loopback address
        if F::is_link_scoped(&packet.src) {
            return Ok(Verdict::LeftToTc);
        }
        if !scratch.next_hop.is_searched() && find_cached(ctx, &packet, scratch) {
            return forward_by_cached(ctx, &packet, scratch);
        }
        if maps::endpoint(&packet.src).is_some() {
            return Err(DropReason::SourceIsLocal);
        }
        match nat::find_tuple::<F, on_miss::SelectBackendAtDriver>(ctx, &packet, scratch) {
            Ok(true) => send_back(ctx, &packet, scratch),
            // tc sends the ICMP error, which needs more headroom than a driver's buffer has
            Ok(false) | Err(DropReason::NoBackend | DropReason::NoPort) => Ok(Verdict::LeftToTc),
            Err(reason) => Err(reason),
        }
    }
}

/// Whether it is an unfragmented packet without options, of a protocol with ports: nearly all are.
#[inline(always)]
fn is_supported<F: IpFamily>(ctx: &impl Frame, packet: &Packet<F>) -> bool {
    Protocol::has_ports(packet.protocol)
        && packet.fragment == Fragment::Whole
        && packet.l4 == L3 + F::HEADER
        && packet.hop_limit > 1
        && has_complete_checksum(ctx, packet)
}

/// SCTP that has crossed no physical wire may arrive with its checksum still to be computed, and no
/// device computes it after `XDP_TX`.
#[inline(always)]
fn has_complete_checksum<F: IpFamily>(ctx: &impl Frame, packet: &Packet<F>) -> bool {
    packet.protocol != Protocol::SCTP
        || ctx.read::<SctpHeader>(packet.l4).is_ok_and(|header| header.checksum != 0)
}

/// Whether the packet's flow has cached a next hop on this device.
#[inline(always)]
fn find_cached<F: IpFamily>(ctx: &XdpContext, packet: &Packet<F>, scratch: &mut Scratch) -> bool {
    next_hop::find(ctx, packet, scratch, ctx.ifindex(), ctx.length() - L3 as u32)
}

/// Sends the packet by the next hop that its flow has cached, which is on this device.
#[inline(always)]
fn forward_by_cached<F: IpFamily>(
    ctx: &XdpContext,
    packet: &Packet<F>,
    scratch: &Scratch,
) -> Result<Verdict, DropReason> {
    let cached = &scratch.next_hop.found;
    if !is_addressed_to(ctx, cached.src_mac)? {
        return Ok(Verdict::LeftToTc);
    }
    next_hop::apply(ctx, packet, scratch)?;
    let is_to_node = cached.verdict == Verdict::ToWire as u16;
    Ok(if is_to_node { Verdict::ToWire } else { Verdict::ToOutside })
}

/// Whether the frame is addressed to the device with this link address: a device in promiscuous
/// mode also receives frames for others, of flows that are known here.
#[inline(always)]
fn is_addressed_to(ctx: &XdpContext, mac: MacAddr) -> Result<bool, DropReason> {
    with_header(ctx, 0, |eth: &mut EthHeader| eth.dst == mac)
}

/// Rewrites the packet to `scratch.nat_tuple` and sends it out of the device it arrived on, if its
/// route goes there.
#[inline(always)]
fn send_back<F: IpFamily>(
    ctx: &XdpContext,
    packet: &Packet<F>,
    scratch: &Scratch,
) -> Result<Verdict, DropReason> {
    let (src, dst) = (&scratch.nat_tuple.src, &scratch.nat_tuple.dst);
    let verdict = match route::lookup(dst)? {
        Destination::Node(route) if route.is_native() => Verdict::ToWire,
        Destination::Outside { .. } => Verdict::ToOutside,
        // on this node, or through the tunnel
        _ => return Ok(Verdict::LeftToTc),
    };
    let length = ctx.length() as u16 - L3 as u16;
    let NextHop::Resolved { ifindex, next_hop, src_mac, dst_mac, mtu } =
        fib::fib_lookup(ctx, src, dst, length)
    else {
        return Ok(Verdict::LeftToTc);
    };
    // the kernel refreshes a neighbour entry only if it uses it, as tc makes it do
    if maps::is_neighbour_check_due(&next_hop) {
        return Ok(Verdict::LeftToTc);
    }
    if ifindex != ctx.ifindex() || !is_addressed_to(ctx, src_mac)? {
        return Ok(Verdict::LeftToTc);
    }
    if scratch.next_hop.is_wanted() {
        let verdict = verdict as u16;
        next_hop::store(
            scratch,
            CachedNextHop {
                ingress: ifindex,
                egress: ifindex,
                dst_mac,
                src_mac,
                mtu,
                verdict,
                ..CachedNextHop::default()
            },
        );
    }
    if !scratch.nat.is_direct() {
        rewrite::tuple(ctx, packet, scratch)?;
    }
    F::decrement_hop_limit(ctx)?;
    route::set_link_addresses(ctx, dst_mac, src_mac)?;
    Ok(verdict)
}
