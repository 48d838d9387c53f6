//! What a packet says about itself. Ports are read late: a packet that is not translated does not need them.

use core::marker::PhantomData;

use dataplane_common::{
    abi::{Addr, FlowKey, FragmentPorts, Port},
    net::{IcmpHeader, Protocol, TcpHeader, UdpHeader},
    reason::{DropReason, Verdict},
};

use crate::{
    family::IpFamily,
    maps::{self, Work},
    packet::Frame,
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

    /// TCP flags, 0 for any other protocol.
    #[inline(always)]
    pub(crate) fn tcp_flags(&self, ctx: &impl Frame) -> u8 {
        if self.protocol != Protocol::TCP || !self.has_transport() {
            return 0;
        }
        ctx.read::<TcpHeader>(self.l4).map_or(0, |tcp| tcp.flags)
    }
}

/// Leaves the tuple of a packet in `work.from`. An echo has its identifier in place of both ports; other protocols have zeros.
///
/// # Errors
/// [`DropReason::Truncated`], or [`DropReason::FragmentUnknown`] for a later fragment whose first was not seen.
#[inline(always)]
pub(crate) fn tuple<F: IpFamily>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    work: &mut Work,
) -> Result<(), DropReason> {
    work.from = packet.tuple_without_ports();
    let (src, dst) = match packet.fragment {
        Fragment::Whole => transport_ports(ctx, packet)?,
        Fragment::First => {
            let (src, dst) = transport_ports(ctx, packet)?;
            set_fragment_key(packet, work);
            maps::remember_fragment(&work.fragment, FragmentPorts { src, dst });
            (src, dst)
        }
        Fragment::Later => {
            set_fragment_key(packet, work);
            let ports = maps::fragment_ports(&work.fragment).ok_or(DropReason::FragmentUnknown)?;
            (ports.src, ports.dst)
        }
    };
    work.from.src_port = src;
    work.from.dst_port = dst;
    Ok(())
}

#[inline(always)]
fn set_fragment_key<F>(packet: &Packet<F>, work: &mut Work) {
    work.fragment.src = packet.src;
    work.fragment.dst = packet.dst;
    work.fragment.id = packet.fragment_id;
    work.fragment.protocol = packet.protocol;
}

#[inline(always)]
fn transport_ports<F: IpFamily>(ctx: &impl Frame, packet: &Packet<F>) -> Result<(Port, Port), DropReason> {
    transport_ports_at::<F>(ctx, packet.protocol, packet.l4)
}

/// The ports of the transport header at `offset`.
#[inline(always)]
pub(crate) fn transport_ports_at<F: IpFamily>(
    ctx: &impl Frame,
    protocol: u8,
    offset: usize,
) -> Result<(Port, Port), DropReason> {
    match protocol {
        // the first eight bytes of TCP hold its ports where UDP has them; an ICMP error carries no more of it
        Protocol::TCP | Protocol::UDP => {
            let header: UdpHeader = ctx.read(offset)?;
            Ok((header.src_port(), header.dst_port()))
        }
        protocol if protocol == F::ICMP => {
            let icmp: IcmpHeader = ctx.read(offset)?;
            let id = if F::icmp_is_echo(icmp.kind) { icmp.id() } else { Port::new(0) };
            Ok((id, id))
        }
        _ => Ok((Port::new(0), Port::new(0))),
    }
}
