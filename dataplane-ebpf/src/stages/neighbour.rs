//! Neighbour discovery and control messages of pods.
//!
//! A pod's neighbours are fixed: it has one, its gateway. So what a pod asks of its link is
//! answered here or discarded, and never reaches the host's stack, whose neighbour table all pods
//! share. And a pod configures nobody: its router advertisements and redirects are dropped.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, programs::TcContext};
use dataplane_common::{
    abi::Addr,
    checksum,
    net::{
        ArpMessage, EthHeader, GATEWAY_V4, GATEWAY_V6, Icmpv4Type, Icmpv6Type, Ipv6Header, NeighbourMessage,
        Protocol,
    },
    reason::{DropReason, Verdict},
};

use crate::{
    config,
    frame::{
        Frame, L3,
        family::{IpFamily, V6},
        packet::Packet,
        with_header,
    },
    global::PackedResult,
    helpers::skb,
};

/// Answers an ARP request for the gateway; other ARP of a pod is discarded.
#[inline(always)]
pub(crate) fn on_arp(ctx: &TcContext) -> Result<Verdict, DropReason> {
    #[inline(never)]
    fn outlined(ctx: &TcContext) -> PackedResult {
        answer_arp(ctx).into()
    }
    send(ctx, outlined(ctx).unpack()?)
}

/// Handles an ICMP message of a pod that is neighbour discovery or configuration. `None`: it is
/// neither.
#[inline(always)]
pub(crate) fn on_icmp<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
) -> Result<Option<Verdict>, DropReason> {
    if packet.protocol != F::ICMP {
        return Ok(None);
    }
    let Some(kind) = packet.icmp_type(ctx) else { return Ok(None) };
    if F::ICMP == Protocol::ICMP {
        return match kind {
            Icmpv4Type::REDIRECT | Icmpv4Type::ROUTER_ADVERTISEMENT => Err(DropReason::ConfiguresOthers),
            _ => Ok(None),
        };
    }
    match kind {
        Icmpv6Type::ROUTER_ADVERTISEMENT | Icmpv6Type::REDIRECT => Err(DropReason::ConfiguresOthers),
        Icmpv6Type::NEIGHBOUR_SOLICITATION => {
            // with extension headers: discarded
            let answered = packet.l4 == L3 + F::HEADER && answer_solicitation(ctx)?;
            send(ctx, answered).map(Some)
        }
        kind if Icmpv6Type::is_link_control(kind) => Ok(Some(Verdict::NeighbourIgnored)),
        _ => Ok(None),
    }
}

/// Sends the answer that the frame has become back into the pod.
#[inline(always)]
fn send(ctx: &TcContext, answered: bool) -> Result<Verdict, DropReason> {
    if !answered {
        return Ok(Verdict::NeighbourIgnored);
    }
    match skb::redirect(ctx.ifindex()) {
        TC_ACT_REDIRECT => Ok(Verdict::NeighbourAnswered),
        _ => Err(DropReason::BadRoute),
    }
}

/// Turns an ARP request for the gateway into its answer. False for anything else.
#[inline(always)]
fn answer_arp(ctx: &TcContext) -> Result<bool, DropReason> {
    const GATEWAY: [u16; 2] = ArpMessage::ip(GATEWAY_V4.octets());
    let request: ArpMessage = ctx.read(L3)?;
    if request.format != ArpMessage::ETHERNET_IPV4
        || request.operation != ArpMessage::REQUEST
        || request.target_ip != GATEWAY
    {
        return Ok(false);
    }
    with_header(ctx, 0, |eth: &mut EthHeader| eth.set_addresses(eth.src, config::host_mac()))?;
    with_header(ctx, L3, |arp: &mut ArpMessage| {
        arp.operation = ArpMessage::REPLY;
        arp.target_mac = request.sender_mac;
        arp.target_ip = request.sender_ip;
        arp.sender_mac = config::host_mac();
        arp.sender_ip = GATEWAY;
    })?;
    Ok(true)
}

/// Turns a neighbour solicitation for the gateway into its answer. False for anything else.
#[inline(always)]
fn answer_solicitation(ctx: &TcContext) -> Result<bool, DropReason> {
    const L4: usize = L3 + Ipv6Header::LEN;
    let gateway = Addr::from(GATEWAY_V6);
    let ip: Ipv6Header = ctx.read(L3)?;
    // type, code, checksum, flags, target: the option may be missing
    let solicitation: [u32; 6] = ctx.read(L4)?;
    let target = Addr::v6_words([solicitation[2], solicitation[3], solicitation[4], solicitation[5]]);
    // from the unspecified address: duplicate address detection
    if target != gateway || ip.src().is_zero() {
        return Ok(false);
    }
    let eth: EthHeader = ctx.read(0)?;
    skb::set_len(ctx, L4 + size_of::<NeighbourMessage>())?;
    with_header(ctx, 0, |header: &mut EthHeader| header.set_addresses(eth.src, config::host_mac()))?;
    let pseudo_header = V6::write_icmp_ip_header(ctx, &gateway, &ip.src(), size_of::<NeighbourMessage>())?;
    // RFC 4861 §7.1.2
    with_header(ctx, L3, |header: &mut Ipv6Header| header.hop_limit = 255)?;
    let mut advertisement = NeighbourMessage {
        kind: Icmpv6Type::NEIGHBOUR_ADVERTISEMENT,
        code: 0,
        checksum: 0,
        flags: NeighbourMessage::SOLICITED_OVERRIDE,
        target: gateway.words(),
        option: NeighbourMessage::TARGET_LINK_ADDRESS,
        mac: config::host_mac(),
    };
    advertisement.checksum = !checksum::fold(pseudo_header + advertisement.sum());
    with_header(ctx, L4, |message: &mut NeighbourMessage| *message = advertisement)?;
    Ok(true)
}
