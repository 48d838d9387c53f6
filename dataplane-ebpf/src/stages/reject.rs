//! Answers a dropped packet with an ICMP error: port unreachable or time exceeded (RFC 792, RFC
//! 4443), or packet too big (RFC 1191, RFC 8201).
//!
//! The packet itself becomes the error: cut to its headers, with two more in front, and sent back
//! where it came from. A connecting TCP socket takes "port unreachable" for a refused connection,
//! as it would a reset.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, programs::TcContext};
use dataplane_common::{
    abi::{Addr, RouteKind},
    checksum,
    flow::tcp_flags,
    net::{EthHeader, FragmentHeader, IcmpHeader, Protocol, SctpHeader, TcpHeader, UdpHeader},
    reason::{DropReason, HookId},
};

use super::{
    on_miss,
    route::{self, Destination},
};
use crate::{
    frame::{Frame, L3, family::IpFamily, packet::Fragment, with_header},
    global::{self, PackedResult, global_functions},
    helpers::{skb, time},
    maps,
    scratch::{IcmpError, Scratch},
};

/// Turns the packet into an ICMP error and redirects it to its sender. False if the packet gets
/// none: an ICMP message, a fragment, a packet with options.
#[inline(always)]
pub(crate) fn send_icmp_error<F: IpFamily>(
    ctx: &TcContext,
    scratch: &mut Scratch,
    hook: HookId,
    reason: DropReason,
) -> bool {
    let ((kind, code), mtu) = match reason {
        DropReason::TooBig => (F::TOO_BIG, scratch.nat.path_mtu),
        DropReason::TtlExpired => (F::TTL_EXPIRED, 0),
        _ => (F::PORT_UNREACHABLE, 0),
    };
    let kind = u16::from_ne_bytes([kind, code]);
    if scratch.transport & u32::from(tcp_flags::RST) != 0 {
        return false;
    }
    // as the kernel, which limits all but "packet too big"
    if !matches!(reason, DropReason::TooBig) && !may_refuse::<F>(ctx, hook) {
        return false;
    }
    scratch.icmp_error.kind = kind;
    scratch.icmp_error.mtu = mtu;
    set_addresses::<F>(ctx, scratch, reason);
    if !matches!(hook, HookId::FromPod | HookId::FromWire | HookId::ToWire | HookId::FromOverlay) {
        return false;
    }
    let built = global::call(scratch, || call_build_icmp_error::<F>(ctx));
    matches!(built.unpack(), Ok(true))
        && (!matches!(hook, HookId::FromOverlay) || is_sent_into_tunnel::<F>(ctx))
        && send_back(ctx, hook)
}

global_functions! {
    call_build_icmp_error: build_icmp_error_v4, build_icmp_error_v6 = run(build_icmp_error);
    call_name_router: name_router_v4, name_router_v6 = run(name_router);
    call_send_into_tunnel: send_into_tunnel_v4, send_into_tunnel_v6 = run_without_scratch(send_into_tunnel);
    call_may_refuse_pod: may_refuse_pod_v4, may_refuse_pod_v6 = run_without_scratch(may_refuse_pod);
    call_may_refuse_client: may_refuse_client_v4, may_refuse_client_v6 = run_without_scratch(may_refuse_client);
}

/// Sets the addresses of the ICMP error. Its source: a router that discards a packet names itself,
/// otherwise the destination answers.
#[inline(always)]
fn set_addresses<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch, reason: DropReason) {
    let tuple = &scratch.event.tuple;
    (scratch.icmp_error.src, scratch.icmp_error.dst) = (tuple.dst, tuple.src);
    if matches!(reason, DropReason::TtlExpired) {
        let _always = global::call(scratch, || call_name_router::<F>(ctx));
    }
}

/// Makes this node the source of the ICMP error, if it has an address.
#[inline(always)]
fn name_router<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> bool {
    let node = on_miss::source_of::<F>(ctx.ifindex());
    if !node.is_zero() {
        scratch.icmp_error.src = node;
    }
    true
}

/// Redirects an answer that the packet has become to where the packet came from. False if the
/// kernel refuses.
#[inline(always)]
pub(super) fn send_back(ctx: &TcContext, hook: HookId) -> bool {
    skb::mark_handled(ctx);
    let device = ctx.ifindex();
    // at egress, the sender is the host itself
    let action = if hook as u8 == HookId::ToWire as u8 {
        skb::redirect_ingress(device)
    } else {
        skb::redirect(device)
    };
    action == TC_ACT_REDIRECT
}

/// Whether the sender of the packet is told of a refusal: it is one station, and the budget for
/// refusals is not used up.
#[inline(always)]
fn may_refuse<F: IpFamily>(ctx: &TcContext, hook: HookId) -> bool {
    // the source of a pod's packet is proven; elsewhere it may be a victim's
    let from_pod = matches!(hook, HookId::FromPod | HookId::ToWire);
    let may_refuse = if from_pod { call_may_refuse_pod::<F>(ctx) } else { call_may_refuse_client::<F>(ctx) };
    matches!(PackedResult::from_raw(may_refuse).unpack(), Ok(true))
}

#[inline(always)]
fn may_refuse_pod<F: IpFamily>(ctx: &TcContext) -> bool {
    source_station::<F>(ctx).is_some() && maps::spend_refusal(true, time::now_ns())
}

#[inline(always)]
fn may_refuse_client<F: IpFamily>(ctx: &TcContext) -> bool {
    let Some(client) = source_station::<F>(ctx) else { return false };
    let now = time::now_ns();
    maps::spend_client_refusal(&client, now) && maps::spend_refusal(false, now)
}

/// The packet's source, if it is that of one station: not multicast, broadcast, link-local or
/// loopback.
#[inline(always)]
fn source_station<F: IpFamily>(ctx: &TcContext) -> Option<Addr> {
    let packet = F::parse(ctx).ok()?;
    (!packet.src.is_unspecified() && !F::is_link_scoped(&packet.src)).then_some(packet.src)
}

/// As [`send_into_tunnel`], as a global function.
#[inline(always)]
pub(super) fn is_sent_into_tunnel<F: IpFamily>(ctx: &TcContext) -> bool {
    matches!(PackedResult::from_raw(call_send_into_tunnel::<F>(ctx)).unpack(), Ok(true))
}

/// Sends the ICMP message, if its destination is behind the tunnel, to the node there. True if it
/// is.
#[inline(always)]
fn send_into_tunnel<F: IpFamily>(ctx: &TcContext) -> Result<bool, DropReason> {
    let message = F::parse(ctx)?;
    match route::lookup(&message.dst)? {
        Destination::Node(route) if route.kind() == Some(RouteKind::Overlay) => {
            route::encapsulate(ctx, route).map(|()| true)
        }
        _ => Ok(false),
    }
}

/// Makes the packet the ICMP error that the scratch describes. False if it gets none.
#[inline(always)]
fn build_icmp_error<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<bool, DropReason> {
    const FRAGMENT_AND_PORTS: usize = size_of::<FragmentHeader>() + UdpHeader::LEN;
    let error = &scratch.icmp_error;
    let packet = F::parse(ctx)?;
    // IPv6 only: an IPv4 fragment has no fragment header
    let first =
        packet.fragment == Fragment::First && packet.l4 == L3 + F::HEADER + size_of::<FragmentHeader>();
    if error.mtu != 0 && first {
        return quote::<F, { FRAGMENT_AND_PORTS / 4 }>(ctx, error);
    }
    if packet.fragment != Fragment::Whole || packet.l4 != L3 + F::HEADER {
        return Ok(false);
    }
    match packet.protocol {
        Protocol::TCP => quote::<F, { TcpHeader::LEN / 4 }>(ctx, error),
        Protocol::UDP => quote::<F, { UdpHeader::LEN / 4 }>(ctx, error),
        Protocol::SCTP => quote::<F, { SctpHeader::QUOTED / 4 }>(ctx, error),
        _ => Ok(false),
    }
}

/// Makes the packet an ICMP error that quotes its IP header and `WORDS` 32-bit words of what
/// follows. Of TCP that is the whole header, of SCTP more: `bpf_skb_change_tail` refuses to cut in
/// front of a checksum that is not complete yet.
#[inline(always)]
fn quote<F: IpFamily, const WORDS: usize>(ctx: &TcContext, error: &IcmpError) -> Result<bool, DropReason> {
    let eth: EthHeader = ctx.read(0)?;
    let l4 = L3 + F::HEADER;
    let transport: [u32; WORDS] = ctx.read(l4)?;
    let quoted = F::header_sum(ctx)? + checksum::sum_of_words(&transport);
    skb::set_len(ctx, l4 + size_of_val(&transport))?;
    skb::grow_behind_ethernet(ctx, F::HEADER + size_of::<IcmpHeader>())?;
    route::set_link_addresses(ctx, eth.src, eth.dst)?;
    let len = size_of::<IcmpHeader>() + F::HEADER + size_of_val(&transport);
    let pseudo_header = F::write_icmp_ip_header(ctx, &error.src, &error.dst, len)?;
    // ICMPv6 has 32 bits of MTU, whose lower half is where ICMP has its 16; no MTU needs more
    let sequence = (error.mtu as u16).to_be();
    let sum = pseudo_header + quoted + u64::from(error.kind) + u64::from(sequence);
    with_header(ctx, L3 + F::HEADER, |icmp: &mut IcmpHeader| {
        let [kind, code] = error.kind.to_ne_bytes();
        *icmp = IcmpHeader { kind, code, checksum: !checksum::fold(sum), id: 0, sequence };
    })?;
    Ok(true)
}
