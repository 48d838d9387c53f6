//! Refuses a packet: its sender hears at once that nobody answers (ICMP port unreachable, RFC 792, RFC 4443).
//!
//! The packet itself becomes the message: cut to its headers, with room for two more in front, and sent back where it came
//! from. A TCP socket that connects takes it for a refusal, as it would a reset.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, programs::TcContext};
use dataplane_common::{
    abi::RouteKind,
    checksum,
    flow::tcp_flags,
    net::{EthHeader, IcmpHeader, Protocol, SctpHeader, TcpHeader, UdpHeader},
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
pub(crate) fn refuse<F: IpFamily>(ctx: &TcContext, work: &Work, hook: Hook) -> bool {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext) -> Answer {
        turn::<F>(ctx).into()
    }
    if work.transport & u32::from(tcp_flags::RST) != 0 {
        return false;
    }
    let turned = match hook {
        Hook::FromPod | Hook::FromWire | Hook::ToWire => outlined::<F>(ctx).get(),
        Hook::FromOverlay => match outlined::<F>(ctx).get() {
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

#[inline(always)]
fn turn<F: IpFamily>(ctx: &TcContext) -> Result<bool, DropReason> {
    let packet = F::parse(ctx)?;
    if packet.fragment != Fragment::Whole || packet.l4 != L3 + F::HEADER {
        return Ok(false);
    }
    match packet.protocol {
        Protocol::TCP => quote::<F, { TcpHeader::LEN / 4 }>(ctx, &packet),
        Protocol::UDP => quote::<F, { UdpHeader::LEN / 4 }>(ctx, &packet),
        Protocol::SCTP => quote::<F, { SctpHeader::QUOTED / 4 }>(ctx, &packet),
        _ => Ok(false),
    }
}

/// Makes the packet a message that quotes its IP header and so many 32-bit words of what follows. Of TCP the whole header,
/// of SCTP more: the kernel cuts no packet in front of a checksum that is still to be completed.
#[inline(always)]
fn quote<F: IpFamily, const WORDS: usize>(ctx: &TcContext, packet: &Packet<F>) -> Result<bool, DropReason> {
    let eth: EthHeader = ctx.read(0)?;
    let transport: [u32; WORDS] = ctx.read(packet.l4)?;
    let quoted = F::sum_of_header(ctx)? + checksum::sum_of_words(&transport);
    skb::cut(ctx, packet.l4 + size_of_val(&transport))?;
    skb::make_room(ctx, F::HEADER + size_of::<IcmpHeader>())?;
    packet::with_header(ctx, 0, |header: &mut EthHeader| {
        header.set_addresses(eth.src, eth.dst);
        header.ether_type = eth.ether_type;
    })?;
    let len = size_of::<IcmpHeader>() + F::HEADER + size_of_val(&transport);
    let covered = F::write_message_header(ctx, &packet.dst, &packet.src, len)?;
    let (kind, code) = F::PORT_UNREACHABLE;
    let sum = covered + quoted + u64::from(u16::from_ne_bytes([kind, code]));
    packet::with_header(ctx, L3 + F::HEADER, |icmp: &mut IcmpHeader| {
        *icmp = IcmpHeader { kind, code, checksum: !checksum::fold(sum), id: 0, sequence: 0 };
    })?;
    Ok(true)
}
