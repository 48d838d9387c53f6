//! IPv6 (RFC 8200).

use crate::abi::Addr;

/// IPv6 header, 40 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ipv6Header {
    /// Version, traffic class, flow label.
    pub version_class_flow: [u8; 4],
    /// Bytes after this header.
    pub payload_len: [u8; 2],
    /// Protocol of the payload, or the first extension header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub src: [u8; 16],
    /// Destination.
    pub dst: [u8; 16],
}

/// Fragment header (RFC 8200 §4.5), 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FragmentHeader {
    /// Protocol of the payload.
    pub next_header: u8,
    /// Must be ignored.
    pub reserved: u8,
    /// Offset in units of 8 bytes, two reserved bits, more-fragments bit.
    pub offset: [u8; 2],
    /// Identification.
    pub id: [u8; 4],
}

impl Ipv6Header {
    /// Bytes of the header.
    pub const LEN: usize = 40;

    /// IP version.
    #[inline(always)]
    pub const fn version(&self) -> u8 {
        self.version_class_flow[0] >> 4
    }

    /// Bytes after this header.
    #[inline(always)]
    pub const fn payload_len(&self) -> u16 {
        u16::from_be_bytes(self.payload_len)
    }

    /// Source.
    #[inline(always)]
    pub const fn src(&self) -> Addr {
        addr(&self.src)
    }

    /// Destination.
    #[inline(always)]
    pub const fn dst(&self) -> Addr {
        addr(&self.dst)
    }
}

impl FragmentHeader {
    /// Whether this is a part that does not begin with the transport header.
    #[inline(always)]
    pub const fn is_later(&self) -> bool {
        u16::from_be_bytes(self.offset) & 0xfff8 != 0
    }
}

#[inline(always)]
const fn addr(b: &[u8; 16]) -> Addr {
    Addr::v6_words([
        u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
        u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
        u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
    ])
}
