//! TCP (RFC 9293), UDP (RFC 768) and SCTP (RFC 9260).

use crate::{abi::Port, flow::tcp_flags};

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

/// SCTP's common header and the first four bytes of the first chunk, 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SctpHeader {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Verification tag.
    pub tag: u32,
    /// [CRC-32C](crate::crc32c) of the packet with this field 0. 0: still to be computed by the
    /// sending device.
    pub checksum: u32,
    /// Type of the first chunk.
    pub chunk: u8,
    /// Its flags.
    pub chunk_flags: u8,
    /// Its length.
    pub chunk_len: u16,
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

impl SctpHeader {
    /// Bytes of an INIT that an ICMP error must quote for the sender to accept it: they end with
    /// the initiate tag (RFC 9260 §10, "ICMP6").
    pub const QUOTED: usize = 20;

    /// Both ports as one word, in network byte order.
    #[inline(always)]
    pub const fn ports(&self) -> u32 {
        let ([a, b], [c, d]) = (self.src_port.to_ne_bytes(), self.dst_port.to_ne_bytes());
        u32::from_ne_bytes([a, b, c, d])
    }

    /// TCP flags that correspond to the first chunk ([`tcp_flags`]). Control chunks come first in a
    /// packet, with only an acknowledgement before them (RFC 9260 §6.10).
    #[inline(always)]
    pub const fn flags(&self) -> u8 {
        const INIT: u8 = 1;
        const INIT_ACK: u8 = 2;
        const ABORT: u8 = 6;
        const SHUTDOWN: u8 = 7;
        const SHUTDOWN_ACK: u8 = 8;
        const SHUTDOWN_COMPLETE: u8 = 14;
        match self.chunk {
            INIT => tcp_flags::SYN,
            INIT_ACK => tcp_flags::SYN | tcp_flags::ACK,
            // both end the association
            ABORT | SHUTDOWN_COMPLETE => tcp_flags::RST,
            SHUTDOWN | SHUTDOWN_ACK => tcp_flags::FIN | tcp_flags::ACK,
            _ => tcp_flags::ACK,
        }
    }
}
