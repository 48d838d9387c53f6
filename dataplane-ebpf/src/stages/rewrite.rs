//! Turns a packet's tuple into another: addresses, ports and every checksum that covers them.

use dataplane_common::{
    abi::{FlowKey, Port},
    checksum::Change,
    net::{IcmpHeader, Protocol, TcpHeader, UdpHeader},
    reason::DropReason,
};

use super::parse::Packet;
use crate::{
    family::{IpFamily, L3},
    maps::Work,
    packet::{ChecksumField, Covers, Frame},
};

/// Rewrites `packet`, whose tuple is `work.from`, to the tuple `work.to`.
#[inline(always)]
pub(crate) fn tuple<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    work: &Work,
) -> Result<(), DropReason> {
    let Work { from, to, .. } = work;
    let addresses = F::replace_addresses(ctx, L3, &to.src, &to.dst)?;
    // a later fragment has no transport header; the checksum in the first covers the addresses once for all
    if !packet.has_transport() {
        return Ok(());
    }
    match packet.protocol {
        Protocol::TCP => {
            let checksum = ChecksumField::at(packet.l4 + TcpHeader::CHECKSUM);
            transport(ctx, packet.l4, checksum, addresses, from, to)
        }
        Protocol::UDP => {
            let checksum = ChecksumField::optional(packet.l4 + UdpHeader::CHECKSUM);
            transport(ctx, packet.l4, checksum, addresses, from, to)
        }
        protocol if protocol == F::ICMP => {
            let checksum = ChecksumField::at(packet.l4 + IcmpHeader::CHECKSUM);
            if F::ICMP_COVERS_ADDRESSES {
                ctx.mend_checksum(checksum, addresses, Covers::PseudoHeader)?;
            }
            replace_port(ctx, packet.l4 + IcmpHeader::ID, checksum, from.src_port, to.src_port)
        }
        // no ports, and no checksum over the addresses (SCTP, GRE, ESP)
        _ => Ok(()),
    }
}

#[inline(always)]
fn transport(
    ctx: &impl Frame,
    l4: usize,
    checksum: ChecksumField,
    addresses: Change,
    from: &FlowKey,
    to: &FlowKey,
) -> Result<(), DropReason> {
    const SRC_PORT: usize = 0;
    const DST_PORT: usize = 2;
    ctx.mend_checksum(checksum, addresses, Covers::PseudoHeader)?;
    replace_port(ctx, l4 + SRC_PORT, checksum, from.src_port, to.src_port)?;
    replace_port(ctx, l4 + DST_PORT, checksum, from.dst_port, to.dst_port)
}

/// Replaces the port, or echo identifier, at `offset`.
#[inline(always)]
fn replace_port(
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
