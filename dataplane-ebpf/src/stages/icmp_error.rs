//! Messages about a packet (RFC 792, RFC 4443), which carry the head of that packet: both must be translated, or path
//! MTU discovery and "port unreachable" do not work through services and masquerade.
//!
//! The packet inside went the other way: its tuple reversed is a tuple of our flow, in the direction in which the message
//! travels. So the message is rewritten as a packet of the flow would be, and what it carries as its opposite.

use dataplane_common::{
    abi::{FlowKey, Port},
    checksum::Change,
    net::{FragmentHeader, IcmpHeader, Ipv4Header, Ipv6Header, Protocol},
    reason::DropReason,
};

use super::{
    flow,
    parse::{self, Packet},
    translate::NewFlow,
};
use crate::{
    family::{IpFamily, L3},
    maps::Work,
    packet::{ChecksumField, Covers, Frame},
};

/// Translates `packet`, an ICMP error, if the packet it carries belongs to a flow: whether it did. Then `work.to` is the
/// tuple that packets of the flow have where the message goes.
#[inline(always)]
pub(crate) fn translate<F: IpFamily, N: NewFlow>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    work: &mut Work,
) -> Result<bool, DropReason> {
    let inner_l3 = packet.l4 + size_of::<IcmpHeader>();
    let l4 = carried::<F>(ctx, inner_l3, &mut work.from)?;
    parse::transport::<F>(ctx, l4, work)?;
    // what is carried went the other way
    core::mem::swap(&mut work.from.src_port, &mut work.from.dst_port);
    if !flow::peek(work, N::KINDS) {
        return Ok(false);
    }
    let Work { from: travels, to: leaves, .. } = work;

    // outer: to whom the flow's packets go; the source is translated only if it is the flow's own end, a router keeps its
    // address
    let outer_src = if packet.src == travels.src { leaves.src } else { packet.src };
    let outer = F::replace_addresses(ctx, L3, &outer_src, &leaves.dst)?;

    // inner: the opposite direction of what the flow's packets become
    let addresses = F::replace_addresses(ctx, inner_l3, &leaves.dst, &leaves.src)?;
    let checksum = ChecksumField::at(packet.l4 + IcmpHeader::CHECKSUM);
    // the ICMP checksum covers the packet inside. An IPv4 header's own checksum cancels the change of its addresses;
    // IPv6 has none, and its ICMP covers the outer addresses too
    if F::ICMP_COVERS_ADDRESSES {
        ctx.mend_checksum(checksum, outer, Covers::PseudoHeader)?;
        ctx.mend_checksum(checksum, addresses, Covers::Segment)?;
    }
    inner_ports::<F>(ctx, l4, checksum, travels, leaves)?;
    Ok(true)
}

/// Rewrites the ports of the packet inside. Its own transport checksum is left wrong: the receiver reads the ports to find
/// the socket, and the rest of the segment, which the checksum covers, is not there.
#[inline(always)]
fn inner_ports<F: IpFamily>(
    ctx: &impl Frame,
    l4: usize,
    checksum: ChecksumField,
    travels: &FlowKey,
    leaves: &FlowKey,
) -> Result<(), DropReason> {
    if travels.protocol == F::ICMP {
        return replace(ctx, l4 + IcmpHeader::ID, checksum, travels.src_port, leaves.src_port);
    }
    if !Protocol::has_ports(travels.protocol) {
        return Ok(());
    }
    replace(ctx, l4, checksum, travels.dst_port, leaves.dst_port)?;
    replace(ctx, l4 + 2, checksum, travels.src_port, leaves.src_port)
}

#[inline(always)]
fn replace(
    ctx: &impl Frame,
    offset: usize,
    checksum: ChecksumField,
    old: Port,
    new: Port,
) -> Result<(), DropReason> {
    if old == new {
        return Ok(());
    }
    ctx.write_u16(offset, new.wire())?;
    ctx.mend_checksum(checksum, Change::NONE.u16(old.wire(), new.wire()), Covers::Segment)
}

/// Reads the head of the packet inside, which may be cut short after its first eight bytes of transport: leaves its
/// addresses, reversed, in `travels` with its protocol, and returns the offset of its transport header.
#[inline(always)]
fn carried<F: IpFamily>(ctx: &impl Frame, offset: usize, travels: &mut FlowKey) -> Result<usize, DropReason> {
    let (protocol, l4) = if F::ICMP == Protocol::ICMP {
        let ip: Ipv4Header = ctx.read(offset)?;
        if ip.version() != 4 || ip.header_len() < Ipv4Header::LEN {
            return Err(DropReason::BadHeader);
        }
        travels.src = ip.dst();
        travels.dst = ip.src();
        (ip.protocol, offset + ip.header_len())
    } else {
        let ip: Ipv6Header = ctx.read(offset)?;
        if ip.version() != 6 {
            return Err(DropReason::BadHeader);
        }
        travels.src = ip.dst();
        travels.dst = ip.src();
        let l4 = offset + Ipv6Header::LEN;
        if ip.next_header == Protocol::FRAGMENT {
            let fragment: FragmentHeader = ctx.read(l4)?;
            (fragment.next_header, l4 + size_of::<FragmentHeader>())
        } else {
            (ip.next_header, l4)
        }
    };
    travels.protocol = protocol;
    travels.src_port = Port::new(0);
    travels.dst_port = Port::new(0);
    Ok(l4)
}
