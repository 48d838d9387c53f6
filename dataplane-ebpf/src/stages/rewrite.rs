//! Rewrites a packet to another tuple: addresses, ports, and every checksum that covers them.

use dataplane_common::{
    abi::{FlowKey, Port},
    checksum::Change,
    crc32c,
    net::{IcmpHeader, Protocol, SctpHeader, TcpHeader, UdpHeader},
    reason::DropReason,
};

use crate::{
    frame::{
        ChangedIn, ChecksumField, Frame, L3,
        family::IpFamily,
        packet::{Fragment, Packet},
        with_header,
    },
    scratch::Scratch,
};

/// Rewrites `packet`, whose tuple is `scratch.tuple`, to `scratch.nat_tuple`.
#[inline(always)]
pub(crate) fn tuple<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    scratch: &Scratch,
) -> Result<(), DropReason> {
    let Scratch { tuple, nat_tuple, .. } = scratch;
    let addresses = F::replace_addresses(ctx, L3, &nat_tuple.src, &nat_tuple.dst)?;
    // a later fragment has no transport header; the checksum in the first covers the addresses
    if !packet.has_transport() {
        return Ok(());
    }
    // read from memory, so that the verifier forgets which path led here
    match nat_tuple.protocol {
        Protocol::TCP => {
            let checksum = ChecksumField::at(packet.l4 + TcpHeader::CHECKSUM);
            transport(ctx, packet.l4, checksum, addresses, tuple, nat_tuple)
        }
        Protocol::UDP => {
            let checksum = ChecksumField::optional(packet.l4 + UdpHeader::CHECKSUM);
            transport(ctx, packet.l4, checksum, addresses, tuple, nat_tuple)
        }
        protocol if protocol == F::ICMP => {
            let checksum = ChecksumField::at(packet.l4 + IcmpHeader::CHECKSUM);
            if F::ICMP_COVERS_ADDRESSES {
                ctx.update_checksum(checksum, addresses, ChangedIn::PseudoHeader)?;
            }
            replace_port(ctx, packet.l4 + IcmpHeader::ID, checksum, tuple.src_port, nat_tuple.src_port)
        }
        Protocol::SCTP => sctp(ctx, packet, tuple, nat_tuple),
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
    tuple: &FlowKey,
    nat_tuple: &FlowKey,
) -> Result<(), DropReason> {
    ctx.update_checksum(checksum, addresses, ChangedIn::PseudoHeader)?;
    let old = [tuple.src_port.wire(), tuple.dst_port.wire()];
    let new = [nat_tuple.src_port.wire(), nat_tuple.dst_port.wire()];
    if old == new {
        return Ok(());
    }
    let ports = Change::NONE.u16(old[0], new[0]).u16(old[1], new[1]);
    ctx.update_checksum(checksum, ports, ChangedIn::Segment)?;
    with_header(ctx, l4, |ports: &mut [u16; 2]| *ports = new)
}

/// Rewrites the ports of SCTP, whose checksum does not cover the addresses.
#[inline(always)]
fn sctp<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    tuple: &FlowKey,
    nat_tuple: &FlowKey,
) -> Result<(), DropReason> {
    if tuple.src_port == nat_tuple.src_port && tuple.dst_port == nat_tuple.dst_port {
        return Ok(());
    }
    let mut header: SctpHeader = ctx.read(packet.l4)?;
    let old = header.ports();
    header.src_port = nat_tuple.src_port.wire();
    header.dst_port = nat_tuple.dst_port.wire();
    // 0: the sending device computes it (`skb_crc32c_csum_help` of the kernel)
    if header.checksum != 0 {
        if packet.fragment != Fragment::Whole {
            return Err(DropReason::FragmentChecksum);
        }
        let len = F::transport_len(ctx, packet.l4)?;
        header.checksum = update_crc32c(header.checksum, old, header.ports(), len.into());
    }
    // only the common header may be made linear: the chunks of a GSO packet are in buffers of their
    // own (`sctp_packet_gso_append` of the kernel), and pulling one breaks its segmentation
    with_header(ctx, packet.l4, |[ports, _tag, checksum]: &mut [u32; 3]| {
        *ports = header.ports();
        *checksum = header.checksum;
    })
}

/// The CRC-32C of a packet of `len` bytes after its first word, `old`, became `new`. A global
/// function: the verifier checks it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn update_crc32c(checksum: u32, old: u32, new: u32, len: u32) -> u32 {
    crc32c::replace_first_word(checksum, old, new, len as u16)
}

/// Replaces the port or echo identifier at `offset`.
#[inline(always)]
pub(super) fn replace_port(
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
    ctx.update_checksum(checksum, Change::NONE.u16(old.wire(), new.wire()), ChangedIn::Segment)
}
