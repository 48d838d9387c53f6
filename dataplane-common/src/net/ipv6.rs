//! IPv6 (RFC 8200).

use super::Protocol;
use crate::abi::Addr;

/// IPv6 header, 40 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ipv6Header {
    /// Version, traffic class, flow label.
    pub version_class_flow: u32,
    /// Bytes after this header.
    pub payload_len: u16,
    /// Protocol of the payload, or the first extension header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub src: [u32; 4],
    /// Destination.
    pub dst: [u32; 4],
}

/// Fragment header (RFC 8200 §4.5), 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FragmentHeader {
    /// Protocol of the payload.
    pub next_header: u8,
    /// Reserved; to be ignored.
    pub reserved: u8,
    /// Offset in units of 8 bytes, two reserved bits, more-fragments bit.
    pub offset: u16,
    /// Identification.
    pub id: u32,
}

impl Ipv6Header {
    /// Bytes of the header.
    pub const LEN: usize = 40;

    /// The header of an ICMPv6 message of `len` bytes sent by the node itself. Addresses in network
    /// byte order.
    #[inline(always)]
    pub const fn for_icmp(src: [u32; 4], dst: [u32; 4], len: usize) -> Self {
        let (version_class_flow, payload_len) = (0x6000_0000_u32.to_be(), (len as u16).to_be());
        Self { version_class_flow, payload_len, next_header: Protocol::ICMPV6, hop_limit: 64, src, dst }
    }

    /// IP version.
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        (u32::from_be(self.version_class_flow) >> 28) as u8
    }

    /// Bytes after this header.
    #[inline(always)]
    pub const fn payload_len(&self) -> u16 {
        u16::from_be(self.payload_len)
    }

    /// Source.
    #[inline(always)]
    pub const fn src(&self) -> Addr {
        Addr::v6_words(self.src)
    }

    /// Destination.
    #[inline(always)]
    pub const fn dst(&self) -> Addr {
        Addr::v6_words(self.dst)
    }

    /// Replaces the source. The caller updates transport checksums.
    #[inline(always)]
    pub const fn set_src(&mut self, src: &Addr) {
        self.src = src.words();
    }

    /// Replaces the destination. The caller updates transport checksums.
    #[inline(always)]
    pub const fn set_dst(&mut self, dst: &Addr) {
        self.dst = dst.words();
    }
}

impl FragmentHeader {
    /// Offset of its data in the fragmented packet, in bytes.
    #[inline(always)]
    pub const fn data_offset(&self) -> u32 {
        (u16::from_be(self.offset) & 0xfff8) as u32
    }

    /// Whether fragments come behind it.
    #[inline(always)]
    pub const fn has_more(&self) -> bool {
        u16::from_be(self.offset) & 1 != 0
    }

    /// Whether this is a later fragment, without the transport header.
    #[inline(always)]
    pub const fn is_later(&self) -> bool {
        u16::from_be(self.offset) & 0xfff8 != 0
    }
}
