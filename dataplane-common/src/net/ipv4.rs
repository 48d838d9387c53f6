//! IPv4 (RFC 791).

use super::Protocol;
use crate::{
    abi::Addr,
    checksum::{self, Change},
};

/// IPv4 header without options, 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ipv4Header {
    /// Version and header length in words.
    pub version_ihl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Length of the packet.
    pub total_len: u16,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: u16,
    /// Source.
    pub src: u32,
    /// Destination.
    pub dst: u32,
}

impl Ipv4Header {
    /// Bytes of the header without options.
    pub const LEN: usize = 20;
    const DONT_FRAGMENT: u16 = 0x4000;
    const MORE_FRAGMENTS: u16 = 0x2000;
    const OFFSET: u16 = 0x1fff;

    /// The header of an ICMP message of `len` bytes sent by the node itself. Addresses in network
    /// byte order.
    #[inline(always)]
    pub const fn for_icmp(src: u32, dst: u32, len: usize) -> Self {
        // version 4 without options; precedence "internetwork control", as the kernel's ICMP errors
        // (RFC 1812 §4.3.2.5)
        let (version_ihl, tos, ttl) = (0x45, 0xc0, 64);
        let total_len = ((Self::LEN + len) as u16).to_be();
        let words = [
            u32::from_ne_bytes([version_ihl, tos, total_len.to_ne_bytes()[0], total_len.to_ne_bytes()[1]]),
            u32::from_ne_bytes([ttl, Protocol::ICMP, 0, 0]),
            src,
            dst,
        ];
        let checksum = !checksum::fold(checksum::sum_of_words(&words));
        let (id, fragment, protocol) = (0, 0, Protocol::ICMP);
        Self { version_ihl, tos, total_len, id, fragment, ttl, protocol, checksum, src, dst }
    }

    /// Whether routers may fragment it (DF is not set).
    #[inline(always)]
    pub const fn may_be_fragmented(&self) -> bool {
        u16::from_be(self.fragment) & Self::DONT_FRAGMENT == 0
    }

    /// IP version.
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        self.version_ihl >> 4
    }

    /// Length of the header with options, in bytes.
    #[inline(always)]
    pub const fn header_len(&self) -> usize {
        ((self.version_ihl & 0x0f) as usize) * 4
    }

    /// Length of the packet, header included.
    #[inline(always)]
    pub const fn total_len(&self) -> u16 {
        u16::from_be(self.total_len)
    }

    /// Whether this is a fragment.
    #[inline(always)]
    pub const fn is_fragment(&self) -> bool {
        u16::from_be(self.fragment) & (Self::MORE_FRAGMENTS | Self::OFFSET) != 0
    }

    /// Offset of its data in the fragmented packet, in bytes.
    #[inline(always)]
    pub const fn fragment_offset(&self) -> u32 {
        (u16::from_be(self.fragment) & Self::OFFSET) as u32 * 8
    }

    /// Whether fragments come behind it.
    #[inline(always)]
    pub const fn has_more_fragments(&self) -> bool {
        u16::from_be(self.fragment) & Self::MORE_FRAGMENTS != 0
    }

    /// Whether this is a later fragment, without the transport header.
    #[inline(always)]
    pub const fn is_later_fragment(&self) -> bool {
        u16::from_be(self.fragment) & Self::OFFSET != 0
    }

    /// Source.
    #[inline(always)]
    pub const fn src(&self) -> Addr {
        Addr::v4_word(self.src)
    }

    /// Destination.
    #[inline(always)]
    pub const fn dst(&self) -> Addr {
        Addr::v4_word(self.dst)
    }

    /// Decrements the TTL, which must not be 0, and updates the checksum.
    #[inline(always)]
    pub const fn decrement_ttl(&mut self) {
        let old = u16::from_ne_bytes([self.ttl, self.protocol]);
        self.ttl -= 1;
        let new = u16::from_ne_bytes([self.ttl, self.protocol]);
        self.checksum = Change::NONE.u16(old, new).apply(self.checksum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

    #[test]
    fn checksum_is_valid_after_decrementing_the_ttl() {
        for ttl in 1..=255 {
            let mut bytes = [0x45, 0, 0, 84, 0x12, 0x34, 0x40, 0, ttl, 6, 0, 0, 10, 1, 0, 2, 10, 1, 1, 2];
            let sum = checksum::of(&bytes);
            bytes[10..12].copy_from_slice(&sum.to_ne_bytes());
            let mut header = Ipv4Header {
                version_ihl: bytes[0],
                tos: 0,
                total_len: 84_u16.to_be(),
                id: 0x1234_u16.to_be(),
                fragment: 0x4000_u16.to_be(),
                ttl,
                protocol: 6,
                checksum: sum,
                src: u32::from_ne_bytes([10, 1, 0, 2]),
                dst: u32::from_ne_bytes([10, 1, 1, 2]),
            };
            header.decrement_ttl();
            bytes[8] = header.ttl;
            bytes[10..12].copy_from_slice(&header.checksum.to_ne_bytes());
            assert_eq!(checksum::fold(checksum::sum(&bytes)), 0xffff);
        }
    }
}
