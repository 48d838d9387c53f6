//! KeyedMutex a packet's tuple into another: addresses, ports and every checksum that covers them.

use dataplane_common::{
    abi::{FlowKey, Port},
    checksum::Change,
    crc32c,
    net::{IcmpHeader, Protocol, SctpHeader, TcpHeader, UdpHeader},
    reason::DropReason,
};

use super::parse::{Fragment, Packet};
use crate::{
    family::{IpFamily, L3},
    maps::Work,
    packet::{self, ChecksumField, Covers, Frame},
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
    // read anew: to the verifier the ways that led here end as one
    match to.protocol {
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
        Protocol::SCTP => sctp(ctx, packet, from, to),
        // no ports, and no checksum over the addresses (GRE, ESP)
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

/// Rewrites the ports of SCTP, whose checksum is not over the addresses.
#[inline(always)]
fn sctp<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    from: &FlowKey,
    to: &FlowKey,
) -> Result<(), DropReason> {
    if from.src_port == to.src_port && from.dst_port == to.dst_port {
        return Ok(());
    }
    let mut header: SctpHeader = ctx.read(packet.l4)?;
    let old = header.ports();
    header.src_port = to.src_port.wire();
    header.dst_port = to.dst_port.wire();
    // 0: the device that sends it computes the whole, over the field as well (`skb_crc32c_csum_help` of the kernel)
    if header.checksum != 0 {
        if packet.fragment != Fragment::Whole {
            return Err(DropReason::FragmentChecksum);
        }
        let len = F::transport_len(ctx, packet.l4)?;
        header.checksum = mend_crc32c(header.checksum, old, header.ports(), len.into());
    }
    // no byte behind the common header may be asked for in place: the chunks of a packet that is yet to be cut are in buffers of
    // their own (`sctp_packet_gso_append` of the kernel), and making one reachable tears it
    packet::with_header(ctx, packet.l4, |[ports, _tag, checksum]: &mut [u32; 3]| {
        *ports = header.ports();
        *checksum = header.checksum;
    })
}

/// The CRC-32C of a packet of `len` bytes whose first word was `old`, once that is `new`. A function of its own to the verifier,
/// which it walks once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mend_crc32c(checksum: u32, old: u32, new: u32, len: u32) -> u32 {
    crc32c::replace_first_word(checksum, old, new, len as u16)
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
