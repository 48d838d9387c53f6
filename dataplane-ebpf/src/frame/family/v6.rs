//! IPv6 (RFC 8200) and its extension headers.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use dataplane_common::{
    abi::{Addr, ClusterRange, Device},
    checksum::{self, Change},
    net::{FragmentHeader, Icmpv6Type, Ipv6Header, Protocol},
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
    helpers::is_zero,
};

/// IPv6.
pub(crate) enum V6 {}

/// Extension headers a packet may have; one with more is dropped. The verifier walks each.
const MAX_EXTENSION_HEADERS: usize = 6;

impl IpFamily for V6 {
    const IS_V4: bool = false;
    const ICMP: u8 = Protocol::ICMPV6;
    const ICMP_COVERS_ADDRESSES: bool = true;
    const HEADER: usize = Ipv6Header::LEN;
    const PORT_UNREACHABLE: (u8, u8) = (Icmpv6Type::UNREACHABLE, 4);
    const TOO_BIG: (u8, u8) = (Icmpv6Type::TOO_BIG, 0);
    const TTL_EXPIRED: (u8, u8) = (Icmpv6Type::TIME_EXCEEDED, 0);
    const ECHO: (u8, u8) = (Icmpv6Type::ECHO_REQUEST, Icmpv6Type::ECHO_REPLY);

    #[inline(always)]
    fn parse(ctx: &impl Frame) -> Result<Packet<Self>, DropReason> {
        let header = with_header(ctx, L3, |ip: &mut Ipv6Header| *ip)?;
        if header.version() != 6 {
            return Err(DropReason::BadHeader);
        }
        // tables and flows have IPv4 addresses in this form: such a packet would pass for IPv4
        if is_mapped(header.src) | is_mapped(header.dst) != 0 {
            return Err(DropReason::MappedAddress);
        }
        // 0: the length is in a jumbo payload option (RFC 2675), or absent (BIG TCP)
        let payload_len = header.payload_len() as usize;
        if payload_len != 0 && L3 + Ipv6Header::LEN + payload_len > ctx.length() as usize {
            return Err(DropReason::Truncated);
        }
        let mut packet = Packet::new(
            header.src(),
            header.dst(),
            header.next_header,
            header.hop_limit,
            L3 + Ipv6Header::LEN,
            Fragment::Whole,
            0,
        );
        if is_extension(header.next_header) {
            skip_extensions(ctx, &mut packet)?;
        }
        Ok(packet)
    }

    #[inline(always)]
    fn transport_len(ctx: &impl Frame, l4: usize) -> Result<u16, DropReason> {
        let header = with_header(ctx, L3, |ip: &mut Ipv6Header| *ip)?;
        Ok(header.payload_len().wrapping_sub((l4 - L3 - Ipv6Header::LEN) as u16))
    }

    const FRAGMENTS_SHARE_PROTOCOL: bool = false;

    #[inline(always)]
    fn extent(ctx: &impl Frame, packet: &Packet<Self>) -> Result<Extent, DropReason> {
        let ip = with_header(ctx, L3, |ip: &mut Ipv6Header| *ip)?;
        let fragment: FragmentHeader = ctx.read(packet.fragment_at)?;
        let headers = packet.fragment_at + size_of::<FragmentHeader>() - L3 - Ipv6Header::LEN;
        Ok(Extent {
            offset: fragment.data_offset(),
            length: u32::from(ip.payload_len()).wrapping_sub(headers as u32),
            is_last: !fragment.has_more(),
        })
    }

    #[inline(always)]
    fn is_extension(protocol: u8) -> bool {
        is_extension(protocol)
    }

    #[inline(always)]
    fn may_be_fragmented(_ctx: &impl Frame) -> bool {
        false
    }

    #[inline(always)]
    fn decrement_hop_limit(ctx: &impl Frame) -> Result<(), DropReason> {
        let change = with_header(ctx, L3, |ip: &mut Ipv6Header| {
            let before = u16::from_ne_bytes([ip.next_header, ip.hop_limit]);
            ip.hop_limit -= 1;
            Change::NONE.u16(before, u16::from_ne_bytes([ip.next_header, ip.hop_limit]))
        })?;
        ctx.adjust_skb_csum(change);
        Ok(())
    }

    #[inline(always)]
    fn answer_header(ctx: &impl Frame) -> Result<(), DropReason> {
        let change = with_header(ctx, L3, |ip: &mut Ipv6Header| {
            let before = u16::from_ne_bytes([ip.next_header, ip.hop_limit]);
            (ip.src, ip.dst) = (ip.dst, ip.src);
            ip.hop_limit = DEFAULT_HOP_LIMIT;
            Change::NONE.u16(before, u16::from_ne_bytes([ip.next_header, ip.hop_limit]))
        })?;
        ctx.adjust_skb_csum(change);
        Ok(())
    }

    #[inline(always)]
    fn replace_addresses(
        ctx: &impl Frame,
        offset: usize,
        src: &Addr,
        dst: &Addr,
    ) -> Result<Change, DropReason> {
        let change = with_header(ctx, offset, |ip: &mut Ipv6Header| {
            let change =
                Change::NONE.words(ip.src().words(), src.words()).words(ip.dst().words(), dst.words());
            ip.set_src(src);
            ip.set_dst(dst);
            change
        })?;
        // addresses in a quoted packet are covered by the ICMPv6 checksum, which follows
        if offset == L3 {
            ctx.adjust_skb_csum(change);
        }
        Ok(change)
    }

    #[inline(always)]
    fn write_icmp_ip_header(ctx: &impl Frame, src: &Addr, dst: &Addr, len: usize) -> Result<u64, DropReason> {
        with_header(ctx, L3, |ip: &mut Ipv6Header| {
            *ip = Ipv6Header::for_icmp(src.words(), dst.words(), len);
        })?;
        let pseudo = [(len as u32).to_be(), u32::from(Protocol::ICMPV6).to_be()];
        Ok(checksum::sum_of_words(&src.words())
            + checksum::sum_of_words(&dst.words())
            + checksum::sum_of_words(&pseudo))
    }

    #[inline(always)]
    fn header_sum(ctx: &impl Frame) -> Result<u64, DropReason> {
        ctx.read(L3).map(|words: [u32; Ipv6Header::LEN / 4]| checksum::sum_of_words(&words))
    }

    #[inline(always)]
    fn icmp_is_error(kind: u8) -> bool {
        Icmpv6Type::is_error(kind)
    }

    #[inline(always)]
    fn icmp_is_echo(kind: u8) -> bool {
        kind == Icmpv6Type::ECHO_REQUEST || kind == Icmpv6Type::ECHO_REPLY
    }

    #[inline(always)]
    fn icmp_is_echo_request(kind: u8) -> bool {
        kind == Icmpv6Type::ECHO_REQUEST
    }

    #[inline(always)]
    fn icmp_is_link_scoped(kind: u8) -> bool {
        Icmpv6Type::is_discovery(kind)
    }

    #[inline(always)]
    fn is_link_scoped(addr: &Addr) -> bool {
        let [a, b, ..] = addr.words()[0].to_ne_bytes();
        // ff00::/8 multicast, fe80::/10 link-local, ::1 (RFC 4291)
        a == 0xff || (a == 0xfe && b & 0xc0 == 0x80) || addr.is_loopback()
    }

    #[inline(always)]
    fn is_loopback(addr: &Addr) -> bool {
        addr.is_loopback()
    }

    #[inline(always)]
    fn is_forwardable_link_local(_addr: &Addr) -> bool {
        false
    }

    #[inline(always)]
    fn node_address() -> Addr {
        config::ipv6()
    }

    #[inline(always)]
    fn device_address(device: &Device) -> Addr {
        device.ipv6
    }

    #[inline(always)]
    fn cluster_range() -> ClusterRange {
        config::cluster_ipv6()
    }
}

/// 1 for an IPv4-mapped address (RFC 4291 §2.5.5.2), else 0.
#[inline(always)]
fn is_mapped(words: [u32; 4]) -> u64 {
    is_zero(words[0] | words[1] | (words[2] ^ 0xffff_u32.to_be()))
}

#[inline(always)]
const fn is_extension(next_header: u8) -> bool {
    matches!(
        next_header,
        Protocol::HOP_BY_HOP
            | Protocol::ROUTING
            | Protocol::FRAGMENT
            | Protocol::DESTINATION
            | Protocol::NO_NEXT
    )
}

/// Moves `packet` past its extension headers (RFC 8200 §4). AH and ESP (51, 50) end the walk as
/// protocols without ports: such packets are routed, not translated.
#[inline(always)]
fn skip_extensions(ctx: &impl Frame, packet: &mut Packet<V6>) -> Result<(), DropReason> {
    #[inline(never)]
    fn outlined(ctx: &impl Frame, first: u8) -> u64 {
        walk_extensions(ctx, first)
    }
    let first = packet.protocol;
    let end = match ctx.at_tc() {
        Some(ctx) => walk_extensions_at_tc(ctx.skb.skb, first.into()),
        None => outlined(ctx, first),
    };
    let low = end as u32;
    packet.fragment = match low >> 8 & 3 {
        0 => Fragment::Whole,
        1 => Fragment::First,
        2 => Fragment::Later,
        _ => {
            return Err(DropReason::from_number(low as u8).unwrap_or(DropReason::ExtensionHeaders));
        }
    };
    packet.protocol = low as u8;
    packet.l4 = L3 + Ipv6Header::LEN + (low >> 10 & 0xff) as usize * 8;
    packet.fragment_at = L3 + Ipv6Header::LEN + (low >> 18 & 0xff) as usize * 8;
    packet.fragment_id = (end >> 32) as u32;
    Ok(())
}

/// A [global function](crate::global).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_extensions_at_tc(skb: *mut __sk_buff, first: u32) -> u64 {
    walk_extensions(&TcContext::new(skb), first as u8)
}

/// [`Fragment`] of a packet that is dropped.
const DROPPED: u64 = 3 << 8;

/// Where the walk ends, packed into one register, so that the verifier does not follow every
/// iteration into the code after it. From the lowest bits: 8 of protocol (or drop reason), 2 of
/// [`Fragment`] (3: dropped), 8 of length and 8 of the fragment header's offset in units of 8
/// bytes, 6 unused, 32 of identification.
#[inline(always)]
fn walk_extensions(ctx: &impl Frame, first: u8) -> u64 {
    let (mut protocol, mut length) = (first, 0_u32);
    for _ in 0..MAX_EXTENSION_HEADERS {
        if !is_extension(protocol) || protocol == Protocol::NO_NEXT {
            return u64::from(protocol) | u64::from(length) << 10;
        }
        // all begin with the next header and the length in units of 8 bytes, not counting the first
        // 8
        let Ok(header) = ctx.read::<FragmentHeader>(L3 + Ipv6Header::LEN + length as usize * 8) else {
            return u64::from(DropReason::Truncated.number()) | DROPPED;
        };
        if protocol == Protocol::FRAGMENT {
            return behind_fragment_header(ctx, header, length);
        }
        protocol = header.next_header;
        length += 1 + u32::from(header.reserved);
        if length > 128 {
            break;
        }
    }
    u64::from(DropReason::ExtensionHeaders.number()) | DROPPED
}

/// The end of the walk at a fragment header, `length` units of 8 bytes behind the IP header. Only
/// destination options may stand behind it (RFC 8200 §4.1), in the first fragment.
#[inline(always)]
fn behind_fragment_header(ctx: &impl Frame, header: FragmentHeader, length: u32) -> u64 {
    let kind = if header.is_later() { 2_u64 } else { 1 };
    // packed before the next read: what is live across it takes stack, of which Linux 6.1 counts 32
    // bytes at a time
    let packed = kind << 8 | u64::from(length) << 18 | u64::from(header.id) << 32;
    let end = |packed: u64| (packed >> 18 & 0xff) + 1;
    if kind == 2 || header.next_header != Protocol::DESTINATION {
        return packed | u64::from(header.next_header) | end(packed) << 10;
    }
    let Ok(options) = ctx.read::<FragmentHeader>(L3 + Ipv6Header::LEN + end(packed) as usize * 8) else {
        return u64::from(DropReason::Truncated.number()) | DROPPED;
    };
    let end = end(packed) + 1 + u64::from(options.reserved);
    packed | u64::from(options.next_header) | (end & 0xff) << 10
}
