//! ICMP (RFC 792) and ICMPv6 (RFC 4443): the same eight bytes.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::{
    abi::{MacAddr, Port},
    checksum,
};

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
    /// Redirect.
    pub const REDIRECT: u8 = 5;
    /// Router advertisement (RFC 1256).
    pub const ROUTER_ADVERTISEMENT: u8 = 9;
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
    /// Time exceeded; code 0: hop limit.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Echo request.
    pub const ECHO_REQUEST: u8 = 128;
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 129;
    /// Multicast listener query, report, done (RFC 2710).
    pub const GROUP_FIRST: u8 = 130;
    /// Router solicitation (RFC 4861).
    pub const ROUTER_SOLICITATION: u8 = 133;
    /// Router advertisement.
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    /// Neighbour solicitation.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// Neighbour advertisement.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    /// Redirect.
    pub const REDIRECT: u8 = 137;
    /// Multicast listener report of version 2 (RFC 3810).
    pub const GROUP_REPORT_V2: u8 = 143;
    /// First type of neighbour discovery (router solicitation).
    pub const DISCOVERY_FIRST: u8 = 133;
    /// Last type of neighbour discovery (redirect).
    pub const DISCOVERY_LAST: u8 = 137;

    /// Whether it is an error, which quotes a packet: types below 128 (RFC 4443 §2.1).
    #[inline(always)]
    pub const fn is_error(kind: u8) -> bool {
        kind < 128
    }

    /// Whether it is neighbour discovery or multicast listener discovery (RFC 2710, RFC 3810).
    #[inline(always)]
    pub const fn is_link_control(kind: u8) -> bool {
        Self::is_discovery(kind)
            || (kind >= Self::GROUP_FIRST && kind < Self::ROUTER_SOLICITATION)
            || kind == Self::GROUP_REPORT_V2
    }

    /// Whether it is neighbour discovery (RFC 4861), which stays on its link.
    #[inline(always)]
    pub const fn is_discovery(kind: u8) -> bool {
        kind >= Self::DISCOVERY_FIRST && kind <= Self::DISCOVERY_LAST
    }
}

/// Next hop of a pod's IPv4 default route (RFC 3927 link-local). No device has this address.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Next hop of a pod's IPv6 default route.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Neighbour solicitation or advertisement with one option, the link address (RFC 4861 §4.3 and
/// §4.4), 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct NeighbourMessage {
    /// 135: solicitation, 136: advertisement.
    pub kind: u8,
    /// 0.
    pub code: u8,
    /// Checksum, also over the pseudo-header.
    pub checksum: u16,
    /// Advertisement: [`Self::SOLICITED_OVERRIDE`]; solicitation: 0.
    pub flags: [u16; 2],
    /// The address that is asked for.
    pub target: [u32; 4],
    /// Type 1 (source) or 2 (target link address), and length 1 (8 bytes).
    pub option: [u8; 2],
    /// The link address.
    pub mac: MacAddr,
}

impl NeighbourMessage {
    /// `flags` of an advertisement that answers a solicitation and replaces what was known.
    pub const SOLICITED_OVERRIDE: [u16; 2] = [0x6000_u16.to_be(), 0];
    /// `option` of the sender's own link address in an advertisement.
    pub const TARGET_LINK_ADDRESS: [u8; 2] = [2, 1];
}

impl NeighbourMessage {
    /// One's-complement sum of the message, for its checksum.
    #[inline(always)]
    pub const fn sum(&self) -> u64 {
        u16::from_ne_bytes([self.kind, self.code]) as u64
            + self.checksum as u64
            + self.flags[0] as u64
            + self.flags[1] as u64
            + checksum::sum_of_words(&self.target)
            + u16::from_ne_bytes(self.option) as u64
            + self.mac.words()[0] as u64
            + self.mac.words()[1] as u64
            + self.mac.words()[2] as u64
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
