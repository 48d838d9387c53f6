//! The next hop of a flow's packets: found once a second, and cached for those in between, whose
//! source, destination, route and neighbour need not be looked up again.
//!
//! It is used only for packets that would get there by all other stages, too: of the same tuple, on
//! the same device, in the same second, and while no table has changed (`FORWARDING_GENERATION`).
//! What depends on the packet itself is checked for each: hop limit, length, fragments.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    abi::{CachedNextHop, Device, Endpoint, EndpointFlags, Route},
    net::Protocol,
    reason::{DropReason, Verdict},
};

use super::{egress, flow, parse, rewrite, route};
use crate::{
    config,
    frame::{
        Frame,
        family::IpFamily,
        packet::{Fragment, Packet},
    },
    global::{self, PackedResult, global_functions},
    helpers::{
        fib::{self, ANY_LENGTH, NextHop},
        skb, time,
    },
    maps,
    scratch::Scratch,
};

/// Forwards the packet by the next hop that its flow has cached, translated as the flow says.
/// `None`: none is cached for this packet, which is unchanged.
#[inline(always)]
pub(crate) fn forward<F: IpFamily>(
    ctx: &TcContext,
    scratch: &mut Scratch,
) -> Result<Option<Verdict>, DropReason> {
    match global::call(scratch, || call_forward::<F>(ctx)).raw() {
        NOT_CACHED => Ok(None),
        TO_POD => Ok(Some(Verdict::ToPod)),
        TO_WIRE => Ok(Some(Verdict::ToWire)),
        TO_OVERLAY => Ok(Some(Verdict::ToOverlay)),
        TO_OUTSIDE => Ok(Some(Verdict::ToOutside)),
        _ => Err(DropReason::WriteFailed),
    }
}

/// What [`call_forward`] returns: a [`Verdict`], or one of these.
const NOT_CACHED: u32 = 0;
const FAILED: u32 = 256;
const TO_POD: u32 = Verdict::ToPod as u32;
const TO_WIRE: u32 = Verdict::ToWire as u32;
const TO_OVERLAY: u32 = Verdict::ToOverlay as u32;
const TO_OUTSIDE: u32 = Verdict::ToOutside as u32;

global_functions! {
    call_forward: forward_cached_v4, forward_cached_v6 = run(try_forward);
    call_cache: cache_next_hop_v4, cache_next_hop_v6 = run(try_cache);
}

#[inline(always)]
fn try_forward<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> PackedResult {
    // a packet that cannot be read is reported by the other stages
    let Ok(packet) = F::parse(ctx) else { return PackedResult::from_raw(NOT_CACHED) };
    let length = egress::length(ctx, &packet).into();
    let returned = if !find(ctx, &packet, scratch, 0, length) {
        NOT_CACHED
    } else if send(ctx, &packet, scratch).is_err() {
        FAILED
    } else {
        scratch.next_hop.found.verdict.into()
    };
    PackedResult::from_raw(returned)
}

/// Whether the packet, of `length` bytes, has a cached next hop on the device `egress` (0: any):
/// then it is `scratch.next_hop.found`, and `scratch.nat_tuple` the tuple it leaves with.
#[inline(always)]
pub(crate) fn find<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    scratch: &mut Scratch,
    egress: u32,
    length: u32,
) -> bool {
    let is_usual = packet.fragment == Fragment::Whole
        && packet.hop_limit > 1
        && (packet.protocol == Protocol::TCP || packet.protocol == Protocol::UDP);
    is_usual
        && (packet.dst != F::node_address() || route::is_port_translated(ctx, packet))
        && parse::tuple(ctx, packet, scratch).is_ok()
        && flow::lookup_with_next_hop(scratch, ctx.ifindex(), egress, length)
}

/// Translates the packet, and sends it.
#[inline(always)]
fn send<F: IpFamily>(ctx: &TcContext, packet: &Packet<F>, scratch: &Scratch) -> Result<(), DropReason> {
    apply(ctx, packet, scratch)?;
    let cached = &scratch.next_hop.found;
    let action = if cached.verdict == Verdict::ToPod as u16 {
        skb::set_packet_host(ctx)?;
        skb::redirect_peer(cached.egress)
    } else {
        if cached.verdict == Verdict::ToOverlay as u16 {
            // the row has the other end of the tunnel
            let route = maps::route(&scratch.nat_tuple.dst).ok_or(DropReason::BadRoute)?;
            route::encapsulate(ctx, route)?;
        }
        skb::mark_handled(ctx);
        skb::redirect(cached.egress)
    };
    route::redirect_result(action, Verdict::Forwarded).map(|_| ())
}

/// Translates the packet, decrements its hop limit and addresses its frame.
#[inline(always)]
pub(crate) fn apply<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    scratch: &Scratch,
) -> Result<(), DropReason> {
    if !scratch.nat.is_direct() {
        rewrite::tuple(ctx, packet, scratch)?;
    }
    F::decrement_hop_limit(ctx)?;
    let cached = &scratch.next_hop.found;
    route::set_link_addresses(ctx, cached.dst_mac, cached.src_mac)
}

/// Caches the next hop of a translated packet that is about to be forwarded, if its flow asked for
/// it. Its tuple is `scratch.nat_tuple`.
#[inline(always)]
pub(crate) fn cache<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) {
    if scratch.next_hop.is_wanted() {
        // without it the next packet takes the other stages, too
        let _best_effort = global::call(scratch, || call_cache::<F>(ctx));
    }
}

#[inline(always)]
fn try_cache<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> bool {
    let mut cached = CachedNextHop { ingress: ctx.ifindex(), ..CachedNextHop::default() };
    let dst = &scratch.nat_tuple.dst;
    // not by `route::lookup`: old verifiers do not know that a `Destination::Pod` is never another
    let is_known = if let Some(endpoint) = maps::endpoint(dst) {
        is_known_to_pod(endpoint, &mut cached)
    } else if let Some(route) = maps::route(dst)
        && route.is_node()
    {
        is_known_to_node(ctx, scratch, route, &mut cached)
    } else {
        is_known_to_outside::<F>(ctx, scratch, &mut cached)
    };
    if !is_known {
        cached.verdict = CachedNextHop::NONE;
    }
    store(scratch, cached);
    is_known
}

#[inline(always)]
fn is_known_to_pod(endpoint: &Endpoint, cached: &mut CachedNextHop) -> bool {
    cached.egress = endpoint.ifindex;
    cached.dst_mac = endpoint.mac;
    cached.src_mac = config::host_mac();
    cached.verdict = Verdict::ToPod as u16;
    endpoint.flags & (EndpointFlags::HOST | EndpointFlags::DOWN | EndpointFlags::SHAPED) == 0
}

#[inline(always)]
fn is_known_to_node(ctx: &TcContext, scratch: &Scratch, route: &Route, cached: &mut CachedNextHop) -> bool {
    cached.mtu = if route.mtu > u16::MAX.into() { u16::MAX } else { route.mtu as u16 };
    if !route.is_native() {
        cached.egress = route.ifindex;
        cached.dst_mac = config::overlay_mac();
        cached.src_mac = config::host_mac();
        cached.verdict = Verdict::ToOverlay as u16;
        return true;
    }
    let mtu = cached.mtu;
    cached.verdict = Verdict::ToWire as u16;
    let neighbour = fib::fib_lookup(ctx, &scratch.nat_tuple.src, &route.next_hop, ANY_LENGTH);
    let is_known = set_next_hop(cached, &neighbour) && cached.egress == route.ifindex;
    cached.mtu = mtu;
    is_known
}

#[inline(always)]
fn is_known_to_outside<F: IpFamily>(ctx: &TcContext, scratch: &Scratch, cached: &mut CachedNextHop) -> bool {
    let Ok(packet) = F::parse(ctx) else { return false };
    let (src, dst) = (&scratch.nat_tuple.src, &scratch.nat_tuple.dst);
    // the stack forwards it (`route::forward_translated`)
    let takes_stack = scratch.nat.is_service() || config::egress_stack();
    if takes_stack && *src == scratch.tuple.src {
        return false;
    }
    cached.verdict = Verdict::ToOutside as u16;
    set_next_hop(cached, &fib::fib_lookup(ctx, src, dst, egress::length(ctx, &packet)))
}

/// Sets device, link addresses and MTU. False if they are not all known, or the device has no link
/// addresses.
#[inline(always)]
fn set_next_hop(cached: &mut CachedNextHop, next_hop: &NextHop) -> bool {
    let &NextHop::Resolved { ifindex, src_mac, dst_mac, mtu, .. } = next_hop else { return false };
    cached.egress = ifindex;
    cached.dst_mac = dst_mac;
    cached.src_mac = src_mac;
    cached.mtu = mtu;
    maps::device(ifindex).is_some_and(Device::is_ethernet)
}

/// Writes the next hop where the flow asked for it.
#[inline(always)]
pub(crate) fn store(scratch: &Scratch, mut cached: CachedNextHop) {
    cached.epoch = scratch.next_hop.epoch;
    cached.generation = scratch.next_hop.generation;
    cached.second = time::now();
    if let Some(entry) = maps::flow_next_hop(scratch.next_hop.entry) {
        // SAFETY: array values live as long as the map. Another CPU may write it at the same time:
        // the checksum tells.
        unsafe { entry.write_volatile(cached.with_checksum()) };
    }
}
