//! ICMP errors (RFC 792, RFC 4443). They quote the head of the packet they are about, and both the
//! message and the quoted packet must be translated, or path MTU discovery and "port unreachable"
//! fail through services and masquerade.
//!
//! The quoted packet travelled in the opposite direction: its tuple reversed is a tuple of the
//! flow, in the direction of the message. So the outer header is rewritten as a packet of the flow
//! would be, and the quoted one in reverse.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    abi::{FlowKey, Port},
    net::{FragmentHeader, IcmpHeader, Ipv4Header, Ipv6Header, Protocol},
    reason::DropReason,
};

use super::{flow, parse, rewrite::replace_port};
use crate::{
    frame::{ChangedIn, ChecksumField, Frame, L3, family::IpFamily},
    global::{self, PackedResult, global_functions},
    maps,
    scratch::Scratch,
};

/// Translates an ICMP error, if the packet it quotes belongs to a flow. True if it does: then
/// `scratch.nat_tuple` is the tuple with which packets of the flow travel on. `forward_kinds` as in
/// [`flow::lookup`].
#[inline(always)]
pub(crate) fn translate<F: IpFamily>(
    ctx: &TcContext,
    scratch: &mut Scratch,
    forward_kinds: u32,
) -> PackedResult {
    global::call(scratch, || call_translate_icmp_error::<F>(ctx, forward_kinds))
}

global_functions! {
    call_translate_icmp_error(forward_kinds): translate_icmp_error_v4, translate_icmp_error_v6
        = run(try_translate);
}

#[inline(always)]
fn try_translate<F: IpFamily>(
    ctx: &TcContext,
    scratch: &mut Scratch,
    forward_kinds: u32,
) -> Result<bool, DropReason> {
    let packet = F::parse(ctx)?;
    let quoted_l3 = packet.l4 + size_of::<IcmpHeader>();
    let quoted_l4 = read_quoted_header::<F>(ctx, quoted_l3, &mut scratch.tuple)?;
    parse::transport::<F>(ctx, quoted_l4, scratch)?;
    // addresses are reversed already
    core::mem::swap(&mut scratch.tuple.src_port, &mut scratch.tuple.dst_port);
    if !flow::lookup_without_update(scratch, forward_kinds) {
        return Ok(false);
    }
    let Scratch { tuple, nat_tuple, .. } = scratch;
    // an error is for the end of the flow that sent the quoted packet, and a pod, which is no
    // router, may send one only about its own flows
    let from_pod = maps::endpoint(&packet.src).is_some_and(|endpoint| !endpoint.is_host());
    if packet.dst != tuple.dst || (from_pod && packet.src != tuple.src) {
        return Ok(false);
    }

    // outer header: the source is translated only if it is the flow's own end; a router keeps its
    // address
    let outer_src = if packet.src == tuple.src { nat_tuple.src } else { packet.src };
    let outer = F::replace_addresses(ctx, L3, &outer_src, &nat_tuple.dst)?;

    // quoted header: the opposite direction
    let quoted = F::replace_addresses(ctx, quoted_l3, &nat_tuple.dst, &nat_tuple.src)?;
    let checksum = ChecksumField::at(packet.l4 + IcmpHeader::CHECKSUM);
    // the ICMP checksum covers the quoted packet. The checksum of a quoted IPv4 header cancels the
    // change of its addresses; IPv6 has none, and ICMPv6 covers the outer addresses too
    if F::ICMP_COVERS_ADDRESSES {
        ctx.update_checksum(checksum, outer, ChangedIn::PseudoHeader)?;
        ctx.update_checksum(checksum, quoted, ChangedIn::Segment)?;
    }
    replace_quoted_ports::<F>(ctx, quoted_l4, checksum, tuple, nat_tuple)?;
    Ok(true)
}

/// Rewrites the ports of the quoted packet. Its own transport checksum is left wrong: the receiver
/// uses only the ports, and the rest of the segment, which that checksum covers, is not there.
#[inline(always)]
fn replace_quoted_ports<F: IpFamily>(
    ctx: &impl Frame,
    l4: usize,
    icmp_checksum: ChecksumField,
    tuple: &FlowKey,
    nat_tuple: &FlowKey,
) -> Result<(), DropReason> {
    if tuple.protocol == F::ICMP {
        let offset = l4 + IcmpHeader::ID;
        return replace_port(ctx, offset, icmp_checksum, tuple.src_port, nat_tuple.src_port);
    }
    if !Protocol::has_ports(tuple.protocol) {
        return Ok(());
    }
    replace_port(ctx, l4, icmp_checksum, tuple.dst_port, nat_tuple.dst_port)?;
    replace_port(ctx, l4 + 2, icmp_checksum, tuple.src_port, nat_tuple.src_port)
}

/// Reads the IP header of the quoted packet, which may end eight bytes into its transport header.
/// Leaves the addresses, reversed, and the protocol in `tuple`, and returns the offset of the
/// transport header.
#[inline(always)]
fn read_quoted_header<F: IpFamily>(
    ctx: &impl Frame,
    offset: usize,
    tuple: &mut FlowKey,
) -> Result<usize, DropReason> {
    let (protocol, l4) = if F::ICMP == Protocol::ICMP {
        let ip: Ipv4Header = ctx.read(offset)?;
        if ip.version() != 4 || ip.header_len() < Ipv4Header::LEN {
            return Err(DropReason::BadHeader);
        }
        tuple.src = ip.dst();
        tuple.dst = ip.src();
        (ip.protocol, offset + ip.header_len())
    } else {
        let ip: Ipv6Header = ctx.read(offset)?;
        if ip.version() != 6 {
            return Err(DropReason::BadHeader);
        }
        if ip.src().is_v4() || ip.dst().is_v4() {
            return Err(DropReason::MappedAddress);
        }
        tuple.src = ip.dst();
        tuple.dst = ip.src();
        let l4 = offset + Ipv6Header::LEN;
        if ip.next_header == Protocol::FRAGMENT {
            let fragment: FragmentHeader = ctx.read(l4)?;
            (fragment.next_header, l4 + size_of::<FragmentHeader>())
        } else {
            (ip.next_header, l4)
        }
    };
    tuple.protocol = protocol;
    tuple.src_port = Port::new(0);
    tuple.dst_port = Port::new(0);
    Ok(l4)
}
