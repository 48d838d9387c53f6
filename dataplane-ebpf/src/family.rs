//! What tells IPv4 and IPv6 apart. Everything else is written once, over this trait, and compiled for each.

use dataplane_common::{
    abi::{Addr, ClusterRange},
    checksum::{self, Change},
    net::{EthHeader, FragmentHeader, Icmpv4Type, Icmpv6Type, Ipv4Header, Ipv6Header, Protocol},
    reason::DropReason,
};

use crate::{
    config,
    packet::{self, Frame},
    stages::parse::{Fragment, Packet},
};

/// Offset of the IP header in a frame.
pub(crate) const L3: usize = EthHeader::LEN;

pub(crate) trait IpFamily: Sized {
    /// The ICMP of the family.
    const ICMP: u8;
    /// Whether ICMP's checksum covers the addresses.
    const ICMP_COVERS_ADDRESSES: bool;
    /// Bytes of the IP header without options or extensions.
    const HEADER: usize;
    /// Type and code of "nobody listens at this port".
    const PORT_UNREACHABLE: (u8, u8);
    /// Type and code of "too big, and may not be fragmented".
    const TOO_BIG: (u8, u8);

    /// Reads and checks the IP header.
    fn parse(ctx: &impl Frame) -> Result<Packet<Self>, DropReason>;

    /// Bytes of the packet from offset `l4` of the frame on, by the IP header: a frame may have more behind the packet.
    fn transport_len(ctx: &impl Frame, l4: usize) -> Result<u16, DropReason>;

    /// Whether those on its way may send it in fragments.
    fn may_be_fragmented(ctx: &impl Frame) -> bool;

    /// Takes one hop off. There must be more than one.
    fn decrement_hop_limit(ctx: &impl Frame) -> Result<(), DropReason>;

    /// Replaces the addresses of the IP header at `offset`, mends its own checksum, and returns the change of the bytes
    /// that transport checksums cover.
    fn replace_addresses(
        ctx: &impl Frame,
        offset: usize,
        src: &Addr,
        dst: &Addr,
    ) -> Result<Change, DropReason>;

    /// Writes the IP header of an ICMP message of `len` bytes, and returns the sum of what else its checksum covers.
    fn write_message_header(ctx: &impl Frame, src: &Addr, dst: &Addr, len: usize) -> Result<u64, DropReason>;

    /// The one's-complement sum of the IP header, which has no options or extensions.
    fn sum_of_header(ctx: &impl Frame) -> Result<u64, DropReason>;

    /// Whether the ICMP type carries a packet it is about.
    fn icmp_is_error(kind: u8) -> bool;

    /// Whether the ICMP type is an echo, which has an identifier.
    fn icmp_is_echo(kind: u8) -> bool;

    /// Whether the ICMP type belongs to one link.
    fn icmp_is_link_scoped(kind: u8) -> bool;

    /// Whether the address belongs to one link, to one host, or to a group.
    fn is_link_scoped(addr: &Addr) -> bool;

    /// Whether the address, which belongs to one link, is one that routers know all the same.
    fn is_routed(addr: &Addr) -> bool;

    /// What pods are masqueraded as; unspecified if they are not.
    fn node_address() -> Addr;

    /// Where cluster IPs are.
    fn cluster_range() -> ClusterRange;
}

pub(crate) enum V4 {}

impl IpFamily for V4 {
    const ICMP: u8 = Protocol::ICMP;
    const ICMP_COVERS_ADDRESSES: bool = false;
    const HEADER: usize = Ipv4Header::LEN;
    const PORT_UNREACHABLE: (u8, u8) = (Icmpv4Type::UNREACHABLE, 3);
    const TOO_BIG: (u8, u8) = (Icmpv4Type::UNREACHABLE, 4);

    #[inline(always)]
    fn parse(ctx: &impl Frame) -> Result<Packet<Self>, DropReason> {
        let header = packet::with_header(ctx, L3, |ip: &mut Ipv4Header| *ip)?;
        let header_len = header.header_len();
        if header.version() != 4 || header_len < Ipv4Header::LEN {
            return Err(DropReason::BadHeader);
        }
        let frame_len = ctx.length() as usize;
        let total_len = header.total_len() as usize;
        // 0: a packet above 64 KiB that will be cut (BIG TCP, Linux 6.3)
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
        let header = packet::with_header(ctx, L3, |ip: &mut Ipv4Header| *ip)?;
        Ok(header.total_len().wrapping_sub((l4 - L3) as u16))
    }

    #[inline(always)]
    fn may_be_fragmented(ctx: &impl Frame) -> bool {
        packet::with_header(ctx, L3, |ip: &mut Ipv4Header| ip.may_be_fragmented()).unwrap_or(false)
    }

    #[inline(always)]
    fn decrement_hop_limit(ctx: &impl Frame) -> Result<(), DropReason> {
        packet::with_header(ctx, L3, |ip: &mut Ipv4Header| ip.decrement_ttl())
    }

    #[inline(always)]
    fn replace_addresses(
        ctx: &impl Frame,
        offset: usize,
        src: &Addr,
        dst: &Addr,
    ) -> Result<Change, DropReason> {
        packet::with_header(ctx, offset, |ip: &mut Ipv4Header| {
            let change = Change::NONE.u32(ip.src, src.v4_part()).u32(ip.dst, dst.v4_part());
            ip.src = src.v4_part();
            ip.dst = dst.v4_part();
            ip.checksum = change.apply(ip.checksum);
            change
        })
    }

    #[inline(always)]
    fn write_message_header(ctx: &impl Frame, src: &Addr, dst: &Addr, len: usize) -> Result<u64, DropReason> {
        packet::with_header(ctx, L3, |ip: &mut Ipv4Header| {
            *ip = Ipv4Header::message(src.v4_part(), dst.v4_part(), len);
        })?;
        Ok(0)
    }

    #[inline(always)]
    fn sum_of_header(ctx: &impl Frame) -> Result<u64, DropReason> {
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
    fn icmp_is_link_scoped(_kind: u8) -> bool {
        false
    }

    #[inline(always)]
    fn is_link_scoped(addr: &Addr) -> bool {
        let [a, ..] = addr.v4_part().to_ne_bytes();
        // 224.0.0.0/4 groups, 255.255.255.255, 127.0.0.0/8
        a >= 224 || Self::is_routed(addr) || a == 127
    }

    /// 169.254.0.0/16 (RFC 3927): clouds have their metadata at 169.254.169.254, and IPv4 is forwarded there.
    #[inline(always)]
    fn is_routed(addr: &Addr) -> bool {
        let [a, b, ..] = addr.v4_part().to_ne_bytes();
        a == 169 && b == 254
    }

    #[inline(always)]
    fn node_address() -> Addr {
        config::ipv4()
    }

    #[inline(always)]
    fn cluster_range() -> ClusterRange {
        config::cluster_ipv4()
    }
}

pub(crate) enum V6 {}

/// Extension headers a packet may have before it is refused. Each is one more turn for the verifier.
const MAX_EXTENSION_HEADERS: usize = 6;

impl IpFamily for V6 {
    const ICMP: u8 = Protocol::ICMPV6;
    const ICMP_COVERS_ADDRESSES: bool = true;
    const HEADER: usize = Ipv6Header::LEN;
    const PORT_UNREACHABLE: (u8, u8) = (Icmpv6Type::UNREACHABLE, 4);
    const TOO_BIG: (u8, u8) = (Icmpv6Type::TOO_BIG, 0);

    #[inline(always)]
    fn parse(ctx: &impl Frame) -> Result<Packet<Self>, DropReason> {
        let header = packet::with_header(ctx, L3, |ip: &mut Ipv6Header| *ip)?;
        if header.version() != 6 {
            return Err(DropReason::BadHeader);
        }
        // 0 with a hop-by-hop header: the length is in a jumbo option (RFC 2675), or left out (BIG TCP)
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
        let header = packet::with_header(ctx, L3, |ip: &mut Ipv6Header| *ip)?;
        Ok(header.payload_len().wrapping_sub((l4 - L3 - Ipv6Header::LEN) as u16))
    }

    #[inline(always)]
    fn may_be_fragmented(_ctx: &impl Frame) -> bool {
        false
    }

    #[inline(always)]
    fn decrement_hop_limit(ctx: &impl Frame) -> Result<(), DropReason> {
        let change = packet::with_header(ctx, L3, |ip: &mut Ipv6Header| {
            let before = u16::from_ne_bytes([ip.next_header, ip.hop_limit]);
            ip.hop_limit -= 1;
            Change::NONE.u16(before, u16::from_ne_bytes([ip.next_header, ip.hop_limit]))
        })?;
        ctx.account(change);
        Ok(())
    }

    #[inline(always)]
    fn replace_addresses(
        ctx: &impl Frame,
        offset: usize,
        src: &Addr,
        dst: &Addr,
    ) -> Result<Change, DropReason> {
        let change = packet::with_header(ctx, offset, |ip: &mut Ipv6Header| {
            let change =
                Change::NONE.words(ip.src().words(), src.words()).words(ip.dst().words(), dst.words());
            ip.set_src(src);
            ip.set_dst(dst);
            change
        })?;
        // within a message, the sum over that message follows
        if offset == L3 {
            ctx.account(change);
        }
        Ok(change)
    }

    #[inline(always)]
    fn write_message_header(ctx: &impl Frame, src: &Addr, dst: &Addr, len: usize) -> Result<u64, DropReason> {
        packet::with_header(ctx, L3, |ip: &mut Ipv6Header| {
            *ip = Ipv6Header::message(src.words(), dst.words(), len);
        })?;
        let pseudo = [(len as u32).to_be(), u32::from(Protocol::ICMPV6).to_be()];
        Ok(checksum::sum_of_words(&src.words())
            + checksum::sum_of_words(&dst.words())
            + checksum::sum_of_words(&pseudo))
    }

    #[inline(always)]
    fn sum_of_header(ctx: &impl Frame) -> Result<u64, DropReason> {
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
    fn icmp_is_link_scoped(kind: u8) -> bool {
        Icmpv6Type::is_discovery(kind)
    }

    #[inline(always)]
    fn is_link_scoped(addr: &Addr) -> bool {
        let [a, b, ..] = addr.words()[0].to_ne_bytes();
        // ff00::/8 groups, fe80::/10, ::1 (RFC 4291)
        a == 0xff || (a == 0xfe && b & 0xc0 == 0x80) || addr.is_loopback()
    }

    #[inline(always)]
    fn is_routed(_addr: &Addr) -> bool {
        false
    }

    #[inline(always)]
    fn node_address() -> Addr {
        config::ipv6()
    }

    #[inline(always)]
    fn cluster_range() -> ClusterRange {
        config::cluster_ipv6()
    }
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

/// Moves `packet` past its extension headers (RFC 8200 §4). Authentication and encryption headers (51, 50) end the walk
/// as protocols without ports; what stands behind them cannot be translated, but it can be routed.
#[inline(always)]
fn skip_extensions(ctx: &impl Frame, packet: &mut Packet<V6>) -> Result<(), DropReason> {
    let end = walk_extensions(ctx, packet.protocol);
    match end & 0xff {
        0 => {}
        reason => return Err(DropReason::from_number(reason as u8).unwrap_or(DropReason::ExtensionHeaders)),
    }
    packet.protocol = (end >> 8) as u8;
    packet.fragment = match (end >> 16) as u8 {
        1 => Fragment::First,
        2 => Fragment::Later,
        _ => Fragment::Whole,
    };
    packet.l4 = L3 + Ipv6Header::LEN + usize::from((end >> 24) as u8) * 8;
    packet.fragment_id = (end >> 32) as u32;
    Ok(())
}

/// Where the walk ends, in one register, so that the turns of the loop do not multiply with what follows: from the lowest
/// bits, 8 of drop reason (0: none), 8 of protocol, 8 of [`Fragment`], 8 of length in units of 8 bytes, 32 of
/// identification.
#[inline(never)]
fn walk_extensions(ctx: &impl Frame, first: u8) -> u64 {
    let (mut protocol, mut length) = (first, 0_u32);
    for _ in 0..MAX_EXTENSION_HEADERS {
        if !is_extension(protocol) || protocol == Protocol::NO_NEXT {
            return u64::from(protocol) << 8 | u64::from(length) << 24;
        }
        // the first two bytes are the same in all of them: next header, length in 8 bytes beyond the first 8
        let Ok(header) = ctx.read::<FragmentHeader>(L3 + Ipv6Header::LEN + length as usize * 8) else {
            return u64::from(DropReason::Truncated.number());
        };
        if protocol == Protocol::FRAGMENT {
            // nothing is skipped behind it: a later fragment begins in the middle of what the header names
            let fragment = if header.is_later() { 2 } else { 1 };
            return u64::from(header.next_header) << 8
                | fragment << 16
                | u64::from(length + 1) << 24
                | u64::from(header.id) << 32;
        }
        protocol = header.next_header;
        length += 1 + u32::from(header.reserved);
        if length > 128 {
            break;
        }
    }
    u64::from(DropReason::ExtensionHeaders.number())
}
