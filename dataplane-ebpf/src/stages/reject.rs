//! Refuses a packet: its sender hears at once that nobody answers (ICMP port unreachable, RFC 792, RFC 4443), or that it is too
//! big for its way (RFC 1191, RFC 8201).
//!
//! The packet itself becomes the message: cut to its headers, with room for two more in front, and sent back where it came
//! from. A TCP socket that connects takes it for a refusal, as it would a reset.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, programs::TcContext};
use dataplane_common::{
    abi::RouteKind,
    checksum,
    flow::tcp_flags,
    net::{EthHeader, FragmentHeader, IcmpHeader, Protocol, SctpHeader, TcpHeader, UdpHeader},
    reason::{DropReason, Hook},
};

use super::{
    Answer,
    parse::{Fragment, Packet},
    route::{self, Destination},
};
use crate::{
    family::{IpFamily, L3},
    maps::Work,
    packet::{self, Frame},
    skb,
};

/// Whether the packet is on its way back, as a message. Others (messages, fragments, packets with options) are dropped in
/// silence.
#[inline(always)]
pub(crate) fn refuse<F: IpFamily>(ctx: &TcContext, work: &Work, hook: Hook, reason: DropReason) -> bool {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, kind: u16, mtu: u32) -> Answer {
        turn::<F>(ctx, kind, mtu).into()
    }
    let ((kind, code), mtu) =
        if matches!(reason, DropReason::TooBig) { (F::TOO_BIG, work.mtu) } else { (F::PORT_UNREACHABLE, 0) };
    let kind = u16::from_ne_bytes([kind, code]);
    if work.transport & u32::from(tcp_flags::RST) != 0 {
        return false;
    }
    let turned = match hook {
        Hook::FromPod | Hook::FromWire | Hook::ToWire => outlined::<F>(ctx, kind, mtu).get(),
        Hook::FromOverlay => match outlined::<F>(ctx, kind, mtu).get() {
            Ok(true) => into_tunnel::<F>(ctx),
            other => other,
        },
        _ => return false,
    };
    if !matches!(turned, Ok(true)) {
        return false;
    }
    skb::mark_decided(ctx);
    let device = ctx.ifindex();
    // from a device's egress, the sender is the host itself
    let action =
        if hook as u8 == Hook::ToWire as u8 { skb::redirect_ingress(device) } else { skb::redirect(device) };
    action == TC_ACT_REDIRECT
}

/// Addresses a message to the node of who asked: whether there is one.
#[inline(always)]
fn into_tunnel<F: IpFamily>(ctx: &TcContext) -> Result<bool, DropReason> {
    let message = F::parse(ctx)?;
    match route::find(&message.dst)? {
        Destination::Node(route) if route.kind() == Some(RouteKind::Overlay) => {
            route::enter_tunnel(ctx, route).map(|()| true)
        }
        _ => Ok(false),
    }
}

/// `kind`: type and code, as they lie in the message. `mtu`: 0 where it is not the size that is wrong.
#[inline(always)]
fn turn<F: IpFamily>(ctx: &TcContext, kind: u16, mtu: u32) -> Result<bool, DropReason> {
    const FRAGMENT_AND_PORTS: usize = size_of::<FragmentHeader>() + UdpHeader::LEN;
    let packet = F::parse(ctx)?;
    // of IPv6, whose fragments have a header of their own
    let first =
        packet.fragment == Fragment::First && packet.l4 == L3 + F::HEADER + size_of::<FragmentHeader>();
    if mtu != 0 && first {
        return quote::<F, { FRAGMENT_AND_PORTS / 4 }>(ctx, &packet, kind, mtu);
    }
    if packet.fragment != Fragment::Whole || packet.l4 != L3 + F::HEADER {
        return Ok(false);
    }
    match packet.protocol {
        Protocol::TCP => quote::<F, { TcpHeader::LEN / 4 }>(ctx, &packet, kind, mtu),
        Protocol::UDP => quote::<F, { UdpHeader::LEN / 4 }>(ctx, &packet, kind, mtu),
        Protocol::SCTP => quote::<F, { SctpHeader::QUOTED / 4 }>(ctx, &packet, kind, mtu),
        _ => Ok(false),
    }
}

/// Makes the packet a message that quotes its IP header and so many 32-bit words of what follows. Of TCP the whole header,
/// of SCTP more: the kernel cuts no packet in front of a checksum that is still to be completed.
#[inline(always)]
fn quote<F: IpFamily, const WORDS: usize>(
    ctx: &TcContext,
    packet: &Packet<F>,
    kind: u16,
    mtu: u32,
) -> Result<bool, DropReason> {
    let eth: EthHeader = ctx.read(0)?;
    let behind = L3 + F::HEADER;
    let transport: [u32; WORDS] = ctx.read(behind)?;
    let quoted = F::sum_of_header(ctx)? + checksum::sum_of_words(&transport);
    skb::set_length(ctx, behind + size_of_val(&transport))?;
    skb::make_room(ctx, F::HEADER + size_of::<IcmpHeader>())?;
    packet::with_header(ctx, 0, |header: &mut EthHeader| {
        header.set_addresses(eth.src, eth.dst);
        header.ether_type = eth.ether_type;
    })?;
    let len = size_of::<IcmpHeader>() + F::HEADER + size_of_val(&transport);
    let covered = F::write_message_header(ctx, &packet.dst, &packet.src, len)?;
    // the lower half of ICMPv6's 32 bits is where ICMP has its 16; no device takes more
    let sequence = (mtu as u16).to_be();
    let sum = covered + quoted + u64::from(kind) + u64::from(sequence);
    packet::with_header(ctx, L3 + F::HEADER, |icmp: &mut IcmpHeader| {
        let [kind, code] = kind.to_ne_bytes();
        *icmp = IcmpHeader { kind, code, checksum: !checksum::fold(sum), id: 0, sequence };
    })?;
    Ok(true)
}
