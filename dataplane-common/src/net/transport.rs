//! TCP (RFC 9293) and UDP (RFC 768).

use crate::abi::Port;

/// TCP header without options, 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TcpHeader {
    /// Source port.
    pub src_port: [u8; 2],
    /// Destination port.
    pub dst_port: [u8; 2],
    /// Sequence number.
    pub sequence: [u8; 4],
    /// Acknowledgement number.
    pub acknowledgement: [u8; 4],
    /// Header length in words, in the upper half.
    pub data_offset: u8,
    /// Flags ([`crate::flow::tcp_flags`]).
    pub flags: u8,
    /// Window.
    pub window: [u8; 2],
    /// Checksum.
    pub checksum: [u8; 2],
    /// Urgent pointer.
    pub urgent: [u8; 2],
}

/// UDP header, 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct UdpHeader {
    /// Source port.
    pub src_port: [u8; 2],
    /// Destination port.
    pub dst_port: [u8; 2],
    /// Length with this header.
    pub len: [u8; 2],
    /// Checksum; 0 over IPv4: none.
    pub checksum: [u8; 2],
}

impl TcpHeader {
    /// Offset of the checksum in the header.
    pub const CHECKSUM: usize = 16;
    /// Offset of the flags in the header.
    pub const FLAGS: usize = 13;

    /// Source port.
    #[inline(always)]
    pub const fn src_port(&self) -> Port {
        Port::from_wire(u16::from_ne_bytes(self.src_port))
    }

    /// Destination port.
    #[inline(always)]
    pub const fn dst_port(&self) -> Port {
        Port::from_wire(u16::from_ne_bytes(self.dst_port))
    }
}

impl UdpHeader {
    /// Offset of the checksum in the header.
    pub const CHECKSUM: usize = 6;

    /// Source port.
    #[inline(always)]
    pub const fn src_port(&self) -> Port {
        Port::from_wire(u16::from_ne_bytes(self.src_port))
    }

    /// Destination port.
    #[inline(always)]
    pub const fn dst_port(&self) -> Port {
        Port::from_wire(u16::from_ne_bytes(self.dst_port))
    }
}
