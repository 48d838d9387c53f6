//! IPv4 (RFC 791).

use dataplane_common::{
    abi::{Addr, ClusterRange, Device},
    checksum::{self, Change},
    net::{Icmpv4Type, Ipv4Header, Protocol},
    reason::DropReason,
};

use super::{DEFAULT_HOP_LIMIT, IpFamily};
use crate::{
    config,
    frame::{
        Frame, L3,
        packet::{Extent, Fragment, Packet},
        with_header,
    },
};

/// IPv4.
pub(crate) enum V4 {}

impl IpFamily for V4 {
    const IS_V4: bool = true;
    const ICMP: u8 = Protocol::ICMP;
    const ICMP_COVERS_ADDRESSES: bool = false;
    const HEADER: usize = Ipv4Header::LEN;
    const PORT_UNREACHABLE: (u8, u8) = (Icmpv4Type::UNREACHABLE, 3);
    const TOO_BIG: (u8, u8) = (Icmpv4Type::UNREACHABLE, 4);
    const TTL_EXPIRED: (u8, u8) = (Icmpv4Type::TIME_EXCEEDED, 0);
    const ECHO: (u8, u8) = (Icmpv4Type::ECHO_REQUEST, Icmpv4Type::ECHO_REPLY);

    #[inline(always)]
    fn parse(ctx: &impl Frame) -> Result<Packet<Self>, DropReason> {
        let header = with_header(ctx, L3, |ip: &mut Ipv4Header| *ip)?;
        let header_len = header.header_len();
        if header.version() != 4 || header_len < Ipv4Header::LEN {
            return Err(DropReason::BadHeader);
        }
        let frame_len = ctx.length() as usize;
        let total_len = header.total_len() as usize;
        // 0: a GSO packet above 64 KiB (BIG TCP, Linux 6.3)
        if total_len != 0 {
            if total_len < header_len {
                return Err(DropReason::BadHeader);
            }
            if L3 + total_len > frame_len {
                return Err(DropReason::Truncated);
            }
        } else if !ctx.is_gso() {
            return Err(DropReason::BadHeader);
        }
        let fragment = match (header.is_fragment(), header.is_later_fragment()) {
            (false, _) => Fragment::Whole,
            (true, false) => Fragment::First,
            (true, true) => Fragment::Later,
        };
        Ok(Packet::new(
            header.src(),
            header.dst(),
            header.protocol,
            header.ttl,
            L3 + header_len,
            fragment,
            u32::from(header.id),
        ))
    }

    #[inline(always)]
    fn transport_len(ctx: &impl Frame, l4: usize) -> Result<u16, DropReason> {
        let header = with_header(ctx, L3, |ip: &mut Ipv4Header| *ip)?;
        Ok(header.total_len().wrapping_sub((l4 - L3) as u16))
    }

    const FRAGMENTS_SHARE_PROTOCOL: bool = true;

    #[inline(always)]
    fn extent(ctx: &impl Frame, _packet: &Packet<Self>) -> Result<Extent, DropReason> {
        let header = with_header(ctx, L3, |ip: &mut Ipv4Header| *ip)?;
        Ok(Extent {
            offset: header.fragment_offset(),
            length: u32::from(header.total_len()).wrapping_sub(header.header_len() as u32),
            is_last: !header.has_more_fragments(),
        })
    }

    #[inline(always)]
    fn is_extension(_protocol: u8) -> bool {
        false
    }

    #[inline(always)]
    fn may_be_fragmented(ctx: &impl Frame) -> bool {
        with_header(ctx, L3, |ip: &mut Ipv4Header| ip.may_be_fragmented()).unwrap_or(false)
    }

    #[inline(always)]
    fn decrement_hop_limit(ctx: &impl Frame) -> Result<(), DropReason> {
        with_header(ctx, L3, |ip: &mut Ipv4Header| ip.decrement_ttl())
    }

    #[inline(always)]
    fn answer_header(ctx: &impl Frame) -> Result<(), DropReason> {
        with_header(ctx, L3, |ip: &mut Ipv4Header| {
            let before = u16::from_ne_bytes([ip.ttl, ip.protocol]);
            (ip.src, ip.dst) = (ip.dst, ip.src);
            ip.ttl = DEFAULT_HOP_LIMIT;
            let change = Change::NONE.u16(before, u16::from_ne_bytes([ip.ttl, ip.protocol]));
            ip.checksum = change.apply(ip.checksum);
        })
    }

    #[inline(always)]
    fn replace_addresses(
        ctx: &impl Frame,
        offset: usize,
        src: &Addr,
        dst: &Addr,
    ) -> Result<Change, DropReason> {
        with_header(ctx, offset, |ip: &mut Ipv4Header| {
            let change = Change::NONE.u32(ip.src, src.v4_part()).u32(ip.dst, dst.v4_part());
            ip.src = src.v4_part();
            ip.dst = dst.v4_part();
            ip.checksum = change.apply(ip.checksum);
            change
        })
    }

    #[inline(always)]
    fn write_icmp_ip_header(ctx: &impl Frame, src: &Addr, dst: &Addr, len: usize) -> Result<u64, DropReason> {
        with_header(ctx, L3, |ip: &mut Ipv4Header| {
            *ip = Ipv4Header::for_icmp(src.v4_part(), dst.v4_part(), len);
        })?;
        Ok(0)
    }

    #[inline(always)]
    fn header_sum(ctx: &impl Frame) -> Result<u64, DropReason> {
        ctx.read(L3).map(|words: [u32; Ipv4Header::LEN / 4]| checksum::sum_of_words(&words))
    }

    #[inline(always)]
    fn icmp_is_error(kind: u8) -> bool {
        Icmpv4Type::is_error(kind)
    }

    #[inline(always)]
    fn icmp_is_echo(kind: u8) -> bool {
        kind == Icmpv4Type::ECHO_REQUEST || kind == Icmpv4Type::ECHO_REPLY
    }

    #[inline(always)]
    fn icmp_is_echo_request(kind: u8) -> bool {
        kind == Icmpv4Type::ECHO_REQUEST
    }

    #[inline(always)]
    fn icmp_is_link_scoped(_kind: u8) -> bool {
        false
    }

    #[inline(always)]
    fn is_link_scoped(addr: &Addr) -> bool {
        let [a, ..] = addr.v4_part().to_ne_bytes();
        // multicast and 255.255.255.255, link-local, loopback
        a >= 224 || Self::is_forwardable_link_local(addr) || a == 127
    }

    #[inline(always)]
    fn is_loopback(addr: &Addr) -> bool {
        addr.v4_part().to_ne_bytes()[0] == 127
    }

    /// 169.254.0.0/16 (RFC 3927): cloud metadata services are at 169.254.169.254, and the kernel
    /// forwards to it.
    #[inline(always)]
    fn is_forwardable_link_local(addr: &Addr) -> bool {
        let [a, b, ..] = addr.v4_part().to_ne_bytes();
        a == 169 && b == 254
    }

    #[inline(always)]
    fn node_address() -> Addr {
        config::ipv4()
    }

    #[inline(always)]
    fn device_address(device: &Device) -> Addr {
        device.ipv4
    }

    #[inline(always)]
    fn cluster_range() -> ClusterRange {
        config::cluster_ipv4()
    }
}
