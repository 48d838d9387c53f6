//! What a packet says about itself. Ports are read late: a packet that is not translated does not need them.

use core::marker::PhantomData;

use dataplane_common::{
    abi::{Addr, FlowKey, FragmentPorts, Port},
    net::{IcmpHeader, Protocol, SctpHeader, TcpHeader, UdpHeader},
    reason::{DropReason, Verdict},
};

use super::Answer;
use crate::{
    family::IpFamily,
    maps::{self, Work},
    packet::Frame,
    skb,
};

/// The IP header's content, and where the next one starts.
pub(crate) struct Packet<F> {
    pub(crate) src: Addr,
    pub(crate) dst: Addr,
    /// Of the transport header, behind any extension headers.
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// Offset of the transport header in the frame.
    pub(crate) l4: usize,
    pub(crate) fragment: Fragment,
    pub(crate) fragment_id: u32,
    family: PhantomData<F>,
}

/// Which part of a packet this is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragment {
    Whole,
    /// With the transport header.
    First,
    /// Without.
    Later,
}

impl<F: IpFamily> Packet<F> {
    #[inline(always)]
    pub(crate) const fn new(
        src: Addr,
        dst: Addr,
        protocol: u8,
        hop_limit: u8,
        l4: usize,
        fragment: Fragment,
        fragment_id: u32,
    ) -> Self {
        Self { src, dst, protocol, hop_limit, l4, fragment, fragment_id, family: PhantomData }
    }

    /// The tuple of a protocol that has no ports.
    #[inline(always)]
    pub(crate) const fn tuple_without_ports(&self) -> FlowKey {
        FlowKey::new(self.protocol, self.src, Port::new(0), self.dst, Port::new(0))
    }

    /// Whether the transport header is here.
    #[inline(always)]
    pub(crate) fn has_transport(&self) -> bool {
        self.fragment != Fragment::Later
    }

    /// Traffic that does not leave its link: the kernel's own business (neighbour discovery, groups).
    #[inline(always)]
    pub(crate) fn link_scoped(&self, ctx: &impl Frame) -> Option<Verdict> {
        if F::is_link_scoped(&self.dst) || F::is_link_scoped(&self.src) {
            return Some(Verdict::StackLinkLocal);
        }
        // discovery also speaks from and to global addresses (RFC 4861 §7.2)
        if self.protocol == Protocol::ICMPV6
            && let Ok(icmp) = ctx.read::<IcmpHeader>(self.l4)
            && F::icmp_is_link_scoped(icmp.kind)
        {
            return Some(Verdict::StackLinkLocal);
        }
        None
    }

    /// Whether this is a message about another packet, which it carries.
    #[inline(always)]
    pub(crate) fn is_icmp_error(&self, ctx: &impl Frame) -> bool {
        self.protocol == F::ICMP
            && self.has_transport()
            && ctx.read::<IcmpHeader>(self.l4).is_ok_and(|icmp| F::icmp_is_error(icmp.kind))
    }
}

/// Leaves the tuple of a packet in `work.from`. An echo has its identifier in place of both ports; other protocols have zeros.
/// In `work.transport` stands what else it says.
///
/// # Errors
/// [`DropReason::Truncated`]; [`DropReason::FragmentUnknown`] for a later fragment whose first was not seen;
/// [`DropReason::FragmentOvertaken`] for a first fragment whose later ones are held (`stages::held`).
#[inline(always)]
pub(crate) fn tuple<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    work: &mut Work,
) -> Result<(), DropReason> {
    work.from = packet.tuple_without_ports();
    match packet.fragment {
        Fragment::Whole => transport::<F>(ctx, packet.l4, work),
        Fragment::First => {
            transport::<F>(ctx, packet.l4, work)?;
            set_fragment_key(packet, work);
            let FlowKey { src_port: src, dst_port: dst, .. } = work.from;
            maps::remember_fragment(&work.fragment.packet, FragmentPorts { src, dst, came: skb::now() });
            if work.holds != 0 && maps::held(&work.fragment).is_some() {
                return Err(DropReason::FragmentOvertaken);
            }
            Ok(())
        }
        Fragment::Later => {
            set_fragment_key(packet, work);
            let ports = maps::fragment_ports(&work.fragment.packet).ok_or(DropReason::FragmentUnknown)?;
            work.from.src_port = ports.src;
            work.from.dst_port = ports.dst;
            work.transport = Transport::of::<F>(packet.protocol);
            Ok(())
        }
    }
}

#[inline(always)]
fn set_fragment_key<F>(packet: &Packet<F>, work: &mut Work) {
    let key = &mut work.fragment.packet;
    key.src = packet.src;
    key.dst = packet.dst;
    key.id = packet.fragment_id;
    key.protocol = packet.protocol;
    work.fragment.index = 0;
}

/// What a transport protocol is like, and what its header says. The lowest eight bits are TCP's flags
/// (`dataplane_common::flow::tcp_flags`), or SCTP's chunks in such words.
pub(crate) struct Transport;

impl Transport {
    /// Source and destination have ports.
    pub(crate) const PORTS: u32 = 1 << 8;
    /// One identifier serves as both.
    pub(crate) const ECHO: u32 = 1 << 9;
    /// Connections say when they begin and end.
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

/// Reads the transport header at `offset`, of the protocol `work.from` has: leaves its ports there, and in `work.transport`
/// the rest.
///
/// Through memory in and out: to the verifier the ways through it end as one, and what it knows of the protocol ends with it.
#[inline(always)]
pub(crate) fn transport<F: IpFamily>(
    ctx: &impl Frame,
    offset: usize,
    work: &mut Work,
) -> Result<(), DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &impl Frame, offset: usize, work: &mut Work) -> Answer {
        read_transport::<F>(ctx, offset, work).map(|()| true).into()
    }
    outlined::<F>(ctx, offset, work).get().map(|_| ())
}

#[inline(always)]
fn read_transport<F: IpFamily>(ctx: &impl Frame, offset: usize, work: &mut Work) -> Result<(), DropReason> {
    let protocol = work.from.protocol;
    work.transport = Transport::of::<F>(protocol);
    if protocol == F::ICMP {
        let icmp: IcmpHeader = ctx.read(offset)?;
        if F::icmp_is_echo(icmp.kind) {
            work.from.src_port = icmp.id();
            work.from.dst_port = icmp.id();
        } else {
            work.transport = 0;
        }
        return Ok(());
    }
    if !Protocol::has_ports(protocol) {
        return Ok(());
    }
    // the first eight bytes of TCP and SCTP hold their ports where UDP has them; an ICMP error carries no more of it
    let header: UdpHeader = ctx.read(offset)?;
    work.from.src_port = header.src_port();
    work.from.dst_port = header.dst_port();
    if protocol == Protocol::TCP {
        work.transport |= ctx.read::<TcpHeader>(offset).map_or(0, |tcp| u32::from(tcp.flags));
    } else if protocol == Protocol::SCTP {
        work.transport |= ctx.read::<SctpHeader>(offset).map_or(0, |sctp| u32::from(sctp.flags()));
    }
    Ok(())
}
