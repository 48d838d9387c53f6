//! Answers a dropped packet with an ICMP error: port unreachable or time exceeded (RFC 792, RFC
//! 4443), or packet too big (RFC 1191, RFC 8201).
//!
//! The packet itself becomes the error: cut to its headers, with two more in front, and sent back
//! where it came from. A connecting TCP socket takes "port unreachable" for a refused connection,
//! as it would a reset.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, programs::TcContext};
use dataplane_common::{
    abi::RouteKind,
    checksum,
    flow::tcp_flags,
    net::{EthHeader, FragmentHeader, IcmpHeader, Protocol, SctpHeader, TcpHeader, UdpHeader},
    reason::{DropReason, HookId},
};

use super::{
    PackedResult, on_miss,
    route::{self, Destination},
};
use crate::{
    frame::{Frame, L3, family::IpFamily, packet::Fragment, with_header},
    helpers::{skb, time},
    maps,
    scratch::{IcmpAddresses, Scratch},
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
    #[inline(never)]
    fn outlined<F: IpFamily>(
        ctx: &TcContext,
        kind: u16,
        mtu: u32,
        addresses: &IcmpAddresses,
    ) -> PackedResult {
        build_icmp_error::<F>(ctx, kind, mtu, addresses).into()
    }
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
    set_addresses::<F>(ctx, scratch, reason);
    // in memory: the addresses take too much of the stack
    let addresses = &scratch.icmp_addresses;
    let sent = match hook {
        HookId::FromPod | HookId::FromWire | HookId::ToWire => {
            outlined::<F>(ctx, kind, mtu, addresses).unpack()
        }
        HookId::FromOverlay => match outlined::<F>(ctx, kind, mtu, addresses).unpack() {
            Ok(true) => send_into_tunnel::<F>(ctx),
            other => other,
        },
        _ => return false,
    };
    matches!(sent, Ok(true)) && send_back(ctx, hook)
}

/// Sets the addresses of the ICMP error. Its source: a router that discards a packet names itself,
/// otherwise the destination answers.
#[inline(always)]
fn set_addresses<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch, reason: DropReason) {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) {
        let node = on_miss::source_of::<F>(ctx.ifindex());
        if !node.is_zero() {
            scratch.icmp_addresses.src = node;
        }
    }
    let tuple = &scratch.event.tuple;
    scratch.icmp_addresses = IcmpAddresses { src: tuple.dst, dst: tuple.src };
    if matches!(reason, DropReason::TtlExpired) {
        outlined::<F>(ctx, scratch);
    }
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
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, from_pod: bool) -> PackedResult {
        let Ok(packet) = F::parse(ctx) else { return Ok(false).into() };
        // multicast, broadcast, link-local and loopback
        if packet.src.is_unspecified() || F::is_link_scoped(&packet.src) {
            return Ok(false).into();
        }
        let now = time::now_ns();
        // the source of a pod's packet is proven; elsewhere it may be a victim's
        let allowed =
            (from_pod || maps::spend_client_refusal(&packet.src, now)) && maps::spend_refusal(from_pod, now);
        Ok(allowed).into()
    }
    let from_pod = matches!(hook, HookId::FromPod | HookId::ToWire);
    matches!(outlined::<F>(ctx, from_pod).unpack(), Ok(true))
}

/// Sends the ICMP message, if its destination is behind the tunnel, to the node there. True if it
/// is.
#[inline(always)]
pub(super) fn send_into_tunnel<F: IpFamily>(ctx: &TcContext) -> Result<bool, DropReason> {
    let message = F::parse(ctx)?;
    match route::lookup(&message.dst)? {
        Destination::Node(route) if route.kind() == Some(RouteKind::Overlay) => {
            route::encapsulate(ctx, route).map(|()| true)
        }
        _ => Ok(false),
    }
}

/// `kind`: type and code, as they lie in the message. `mtu`: 0 unless the packet is too big.
/// `tuple`: the packet's.
#[inline(always)]
fn build_icmp_error<F: IpFamily>(
    ctx: &TcContext,
    kind: u16,
    mtu: u32,
    addresses: &IcmpAddresses,
) -> Result<bool, DropReason> {
    const FRAGMENT_AND_PORTS: usize = size_of::<FragmentHeader>() + UdpHeader::LEN;
    let packet = F::parse(ctx)?;
    // IPv6 only: an IPv4 fragment has no fragment header
    let first =
        packet.fragment == Fragment::First && packet.l4 == L3 + F::HEADER + size_of::<FragmentHeader>();
    if mtu != 0 && first {
        return quote::<F, { FRAGMENT_AND_PORTS / 4 }>(ctx, kind, mtu, addresses);
    }
    if packet.fragment != Fragment::Whole || packet.l4 != L3 + F::HEADER {
        return Ok(false);
    }
    match packet.protocol {
        Protocol::TCP => quote::<F, { TcpHeader::LEN / 4 }>(ctx, kind, mtu, addresses),
        Protocol::UDP => quote::<F, { UdpHeader::LEN / 4 }>(ctx, kind, mtu, addresses),
        Protocol::SCTP => quote::<F, { SctpHeader::QUOTED / 4 }>(ctx, kind, mtu, addresses),
        _ => Ok(false),
    }
}

/// Makes the packet an ICMP error that quotes its IP header and `WORDS` 32-bit words of what
/// follows. Of TCP that is the whole header, of SCTP more: `bpf_skb_change_tail` refuses to cut in
/// front of a checksum that is not complete yet.
#[inline(always)]
fn quote<F: IpFamily, const WORDS: usize>(
    ctx: &TcContext,
    kind: u16,
    mtu: u32,
    addresses: &IcmpAddresses,
) -> Result<bool, DropReason> {
    let eth: EthHeader = ctx.read(0)?;
    let l4 = L3 + F::HEADER;
    let transport: [u32; WORDS] = ctx.read(l4)?;
    let quoted = F::header_sum(ctx)? + checksum::sum_of_words(&transport);
    skb::set_len(ctx, l4 + size_of_val(&transport))?;
    skb::grow_behind_ethernet(ctx, F::HEADER + size_of::<IcmpHeader>())?;
    route::set_link_addresses(ctx, eth.src, eth.dst)?;
    let len = size_of::<IcmpHeader>() + F::HEADER + size_of_val(&transport);
    let pseudo_header = F::write_icmp_ip_header(ctx, &addresses.src, &addresses.dst, len)?;
    // ICMPv6 has 32 bits of MTU, whose lower half is where ICMP has its 16; no MTU needs more
    let sequence = (mtu as u16).to_be();
    let sum = pseudo_header + quoted + u64::from(kind) + u64::from(sequence);
    with_header(ctx, L3 + F::HEADER, |icmp: &mut IcmpHeader| {
        let [kind, code] = kind.to_ne_bytes();
        *icmp = IcmpHeader { kind, code, checksum: !checksum::fold(sum), id: 0, sequence };
    })?;
    Ok(true)
}
