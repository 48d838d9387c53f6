//! TCP (RFC 9293) and UDP (RFC 768).

use crate::abi::Port;

/// TCP header without options, 20 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TcpHeader {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Header length in words, in the upper half.
    pub data_offset: u8,
    /// Flags ([`crate::flow::tcp_flags`]).
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Checksum.
    pub checksum: u16,
    /// Urgent pointer.
    pub urgent: u16,
}

/// UDP header, 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct UdpHeader {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Length with this header.
    pub len: u16,
    /// Checksum; 0 over IPv4: none.
    pub checksum: u16,
}

impl UdpHeader {
    /// Bytes of the header.
    pub const LEN: usize = 8;
}

impl TcpHeader {
    /// Bytes of the header without options.
    pub const LEN: usize = 20;
    /// Offset of the checksum in the header.
    pub const CHECKSUM: usize = 16;
    /// Offset of the flags in the header.
    pub const FLAGS: usize = 13;

    /// Source port.
    #[inline(always)]
    pub const fn src_port(&self) -> Port {
        Port::from_wire(self.src_port)
    }

    /// Destination port.
    #[inline(always)]
    pub const fn dst_port(&self) -> Port {
        Port::from_wire(self.dst_port)
    }
}

impl UdpHeader {
    /// Offset of the checksum in the header.
    pub const CHECKSUM: usize = 6;

    /// Source port.
    #[inline(always)]
    pub const fn src_port(&self) -> Port {
        Port::from_wire(self.src_port)
    }

    /// Destination port.
    #[inline(always)]
    pub const fn dst_port(&self) -> Port {
        Port::from_wire(self.dst_port)
    }
}
