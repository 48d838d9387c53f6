//! ICMP (RFC 792) and ICMPv6 (RFC 4443): the same eight bytes.

use crate::abi::Port;

/// ICMP header, 8 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IcmpHeader {
    /// [`Icmpv4Type`] or [`Icmpv6Type`].
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Checksum; ICMPv6 covers the pseudo-header too.
    pub checksum: u16,
    /// Echo: identifier.
    pub id: u16,
    /// Echo: sequence number.
    pub sequence: u16,
}

/// ICMP types.
#[derive(Clone, Copy, Debug)]
pub struct Icmpv4Type;

impl Icmpv4Type {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable; code 3: port, code 4: fragmentation needed.
    pub const UNREACHABLE: u8 = 3;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER: u8 = 12;

    /// Whether it is an error, which quotes a packet.
    #[inline(always)]
    pub const fn is_error(kind: u8) -> bool {
        matches!(kind, Self::UNREACHABLE | Self::TIME_EXCEEDED | Self::PARAMETER)
    }
}

/// ICMPv6 types.
#[derive(Clone, Copy, Debug)]
pub struct Icmpv6Type;

impl Icmpv6Type {
    /// Destination unreachable; code 4: port.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big.
    pub const TOO_BIG: u8 = 2;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// First type of neighbour discovery (router solicitation).
    pub const DISCOVERY_FIRST: u8 = 133;
    /// Last type of neighbour discovery (redirect).
    pub const DISCOVERY_LAST: u8 = 137;

    /// Whether it is an error, which quotes a packet: types below 128 (RFC 4443 §2.1).
    #[inline(always)]
    pub const fn is_error(kind: u8) -> bool {
        kind < 128
    }

    /// Whether it is neighbour discovery (RFC 4861), which stays on its link.
    #[inline(always)]
    pub const fn is_discovery(kind: u8) -> bool {
        kind >= Self::DISCOVERY_FIRST && kind <= Self::DISCOVERY_LAST
    }
}

impl IcmpHeader {
    /// Offset of the checksum in the header.
    pub const CHECKSUM: usize = 2;
    /// Offset of the echo identifier in the header.
    pub const ID: usize = 4;

    /// Echo identifier.
    #[inline(always)]
    pub const fn id(&self) -> Port {
        Port::from_wire(self.id)
    }
}
