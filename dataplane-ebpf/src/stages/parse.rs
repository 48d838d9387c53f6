//! Reads what the stages need of a packet: properties of the IP header, the tuple, the transport
//! protocol. Ports are read late, because a packet that is not translated does not need them.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    abi::FragmentedPacket,
    net::{IcmpHeader, Protocol, SctpHeader, TcpHeader, UdpHeader},
    reason::{DropReason, Verdict},
};

use crate::{
    frame::{
        Frame,
        family::IpFamily,
        packet::{Fragment, Packet},
    },
    global::{self, PackedResult, global_functions},
    helpers::time,
    maps,
    scratch::Scratch,
};

impl<F: IpFamily> Packet<F> {
    /// The verdict for traffic that does not leave its link (neighbour discovery, multicast): the
    /// kernel handles it.
    #[inline(always)]
    pub(crate) fn link_scoped(&self, ctx: &impl Frame) -> Option<Verdict> {
        if F::is_link_scoped(&self.dst) || F::is_link_scoped(&self.src) {
            return Some(Verdict::StackLinkLocal);
        }
        // neighbour discovery also uses global addresses (RFC 4861 §7.2)
        if self.protocol == Protocol::ICMPV6
            && let Ok(icmp) = ctx.read::<IcmpHeader>(self.l4)
            && F::icmp_is_link_scoped(icmp.kind)
        {
            return Some(Verdict::StackLinkLocal);
        }
        None
    }

    /// Type of an ICMP message of the packet's own family; `None` without its header.
    #[inline(always)]
    pub(crate) fn icmp_type(&self, ctx: &impl Frame) -> Option<u8> {
        if !self.has_transport() {
            return None;
        }
        ctx.read::<IcmpHeader>(self.l4).ok().map(|icmp| icmp.kind)
    }

    /// Whether this is an ICMP error, which quotes another packet.
    #[inline(always)]
    pub(crate) fn is_icmp_error(&self, ctx: &impl Frame) -> bool {
        self.protocol == F::ICMP && self.icmp_type(ctx).is_some_and(F::icmp_is_error)
    }
}

/// Writes the packet's tuple to `scratch.tuple` and its transport properties to
/// `scratch.transport`. ICMP echo has its identifier in place of both ports; protocols without
/// ports have zeros.
///
/// # Errors
/// [`DropReason::Truncated`]; [`DropReason::FragmentUnknown`] for a later fragment whose first has
/// not been seen; [`DropReason::FragmentOvertaken`] for a first fragment for which later ones are
/// stored (`stages::reorder`).
#[inline(always)]
pub(crate) fn tuple<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    scratch.tuple = packet.tuple_without_ports();
    if packet.fragment == Fragment::Whole {
        return transport::<F>(ctx, packet.l4, scratch);
    }
    match ctx.at_tc() {
        Some(ctx) => global::call(scratch, || call_read_fragment::<F>(ctx)).unpack().map(|_| ()),
        None => read_fragment(ctx, packet, scratch),
    }
}

global_functions! {
    call_read_fragment: read_fragment_v4, read_fragment_v6 = run(parse_fragment);
    call_read_transport(offset): read_transport_v4, read_transport_v6 = run(read_transport_at_tc);
}

#[inline(always)]
fn parse_fragment<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<(), DropReason> {
    read_fragment(ctx, &F::parse(ctx)?, scratch)
}

/// `tuple` of a fragment.
#[inline(always)]
fn read_fragment<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    if packet.fragment == Fragment::Later {
        // no ports that the first fragment would tell
        if Transport::of::<F>(packet.protocol) == 0 && !F::is_extension(packet.protocol) {
            scratch.transport = 0;
            return Ok(());
        }
        return read_later_fragment(ctx, packet, scratch);
    }
    read_transport::<F>(ctx, scratch, packet.l4 as u32)?;
    set_fragment_key(packet, scratch);
    let first = FragmentedPacket {
        src_port: scratch.tuple.src_port,
        dst_port: scratch.tuple.dst_port,
        received_at: time::now(),
        seen: F::extent(ctx, packet)?.length,
        length: 0,
        protocol: packet.protocol,
        reserved: 0,
        transport: (scratch.transport & !Transport::TCP_FLAGS) as u16,
    };
    maps::store_fragmented_packet(&scratch.reorder.key.packet, first);
    if scratch.reorder.enabled != 0 && maps::buffered_fragment(&scratch.reorder.key).is_some() {
        return Err(DropReason::FragmentOvertaken);
    }
    Ok(())
}

#[inline(always)]
fn read_later_fragment<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    set_fragment_key(packet, scratch);
    let extent = F::extent(ctx, packet)?;
    let key = &scratch.reorder.key.packet;
    let first = maps::fragmented_packet(key).ok_or(DropReason::FragmentUnknown)?;
    scratch.tuple.src_port = first.src_port;
    scratch.tuple.dst_port = first.dst_port;
    scratch.tuple.protocol = first.protocol;
    scratch.transport = u32::from(first.transport);
    if extent.is_last {
        first.length = extent.offset.wrapping_add(extent.length);
    }
    first.seen = first.seen.wrapping_add(extent.length);
    if first.length != 0 && first.seen >= first.length {
        maps::remove_fragmented_packet(key);
    }
    Ok(())
}

#[inline(always)]
fn set_fragment_key<F: IpFamily>(packet: &Packet<F>, scratch: &mut Scratch) {
    let key = &mut scratch.reorder.key.packet;
    key.src = packet.src;
    key.dst = packet.dst;
    key.id = packet.fragment_id;
    key.protocol = if F::FRAGMENTS_SHARE_PROTOCOL { packet.protocol } else { 0 };
    scratch.reorder.key.index = 0;
}

/// Bits of `scratch.transport`. The lowest eight are TCP flags
/// (`dataplane_common::flow::tcp_flags`), or what SCTP's first chunk corresponds to.
pub(crate) struct Transport;

impl Transport {
    /// TCP flags.
    pub(crate) const TCP_FLAGS: u32 = 0xff;
    /// The protocol has ports.
    pub(crate) const PORTS: u32 = 1 << 8;
    /// ICMP echo: the identifier is both ports.
    pub(crate) const ECHO: u32 = 1 << 9;
    /// ICMP echo request: not a reply.
    pub(crate) const ECHO_REQUEST: u32 = 1 << 11;
    /// Connections begin and end explicitly (TCP, SCTP).
    pub(crate) const HANDSHAKE: u32 = 1 << 10;

    #[inline(always)]
    const fn of<F: IpFamily>(protocol: u8) -> u32 {
        match protocol {
            Protocol::TCP | Protocol::SCTP => Self::PORTS | Self::HANDSHAKE,
            Protocol::UDP => Self::PORTS,
            protocol if protocol == F::ICMP => Self::ECHO,
            _ => 0,
        }
    }
}

/// Reads the transport header at `offset`, of protocol `scratch.tuple.protocol`: writes the ports
/// to `scratch.tuple` and the rest to `scratch.transport`.
#[inline(always)]
pub(crate) fn transport<F: IpFamily>(
    ctx: &impl Frame,
    offset: usize,
    scratch: &mut Scratch,
) -> Result<(), DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &impl Frame, scratch: &mut Scratch, offset: u32) -> PackedResult {
        read_transport::<F>(ctx, scratch, offset).into()
    }
    let offset = offset as u32;
    let result = match ctx.at_tc() {
        Some(ctx) => global::call(scratch, || call_read_transport::<F>(ctx, offset)),
        None => outlined::<F>(ctx, scratch, offset),
    };
    result.unpack().map(|_| ())
}

#[inline(always)]
fn read_transport_at_tc<F: IpFamily>(
    ctx: &TcContext,
    scratch: &mut Scratch,
    offset: u32,
) -> Result<(), DropReason> {
    read_transport::<F>(ctx, scratch, offset)
}

#[inline(always)]
fn read_transport<F: IpFamily>(
    ctx: &impl Frame,
    scratch: &mut Scratch,
    offset: u32,
) -> Result<(), DropReason> {
    let offset = offset as usize;
    let protocol = scratch.tuple.protocol;
    scratch.transport = Transport::of::<F>(protocol);
    if protocol == F::ICMP {
        let icmp: IcmpHeader = ctx.read(offset)?;
        if F::icmp_is_echo(icmp.kind) {
            scratch.tuple.src_port = icmp.id();
            scratch.tuple.dst_port = icmp.id();
            if F::icmp_is_echo_request(icmp.kind) {
                scratch.transport |= Transport::ECHO_REQUEST;
            }
        } else {
            scratch.transport = 0;
        }
        return Ok(());
    }
    if !Protocol::has_ports(protocol) {
        return Ok(());
    }
    // TCP and SCTP have their ports where UDP has them; an ICMP error may quote no more than these
    // eight bytes
    let header: UdpHeader = ctx.read(offset)?;
    scratch.tuple.src_port = header.src_port();
    scratch.tuple.dst_port = header.dst_port();
    if protocol == Protocol::TCP {
        scratch.transport |= ctx.read::<TcpHeader>(offset).map_or(0, |tcp| u32::from(tcp.flags));
    } else if protocol == Protocol::SCTP {
        scratch.transport |= ctx.read::<SctpHeader>(offset).map_or(0, |sctp| u32::from(sctp.flags()));
    }
    Ok(())
}
