//! Packet headers and protocol numbers.
//!
//! Fields are in network byte order; host order exists only behind getters. They are words, not
//! bytes, because the BPF back end loads a word of byte alignment with four loads and three shifts.
//! A header has the alignment the device gave it; where a CPU cannot load unaligned words
//! (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`), the verifier rejects the program.

mod arp;
mod eth;
mod icmp;
mod ipv4;
mod ipv6;
mod transport;
mod vxlan;

pub use arp::ArpMessage;
pub use eth::{EthHeader, EtherType};
pub use icmp::{GATEWAY_V4, GATEWAY_V6, IcmpHeader, Icmpv4Type, Icmpv6Type, NeighbourMessage};
pub use ipv4::Ipv4Header;
pub use ipv6::{FragmentHeader, Ipv6Header};
pub use transport::{SctpHeader, TcpHeader, UdpHeader};
pub use vxlan::VXLAN_OVERHEAD;

/// IP protocol numbers (IANA).
#[derive(Clone, Copy, Debug)]
pub struct Protocol;

impl Protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6: nothing follows.
    pub const NO_NEXT: u8 = 59;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;

    /// Whether the protocol has ports, as services need.
    #[inline(always)]
    pub const fn has_ports(number: u8) -> bool {
        matches!(number, Self::TCP | Self::UDP | Self::SCTP)
    }

    /// Whether its connections begin and end explicitly.
    #[inline(always)]
    pub const fn has_handshake(number: u8) -> bool {
        matches!(number, Self::TCP | Self::SCTP)
    }

    /// Its name, for display.
    pub const fn name(number: u8) -> &'static str {
        match number {
            Self::ICMP => "ICMP",
            Self::TCP => "TCP",
            Self::UDP => "UDP",
            Self::ICMPV6 => "ICMPv6",
            Self::SCTP => "SCTP",
            _ => "IP",
        }
    }
}

/// A type whose memory is exactly the bytes of a header.
///
/// # Safety
/// Implementors have no padding and accept every bit pattern.
pub unsafe trait Header: Copy {}

// SAFETY: integers without padding between them.
unsafe impl<const WORDS: usize> Header for [u32; WORDS] {}
// SAFETY: as above.
unsafe impl<const WORDS: usize> Header for [u16; WORDS] {}

macro_rules! header {
    ($($name:ident: $size:literal),+ $(,)?) => { $(
        const _: () = assert!(size_of::<$name>() == $size);
        // SAFETY: repr(C) over integers; the size asserted above is the sum of the fields, so there
        // is no padding.
        unsafe impl Header for $name {}
    )+ };
}

header! {
    EthHeader: 14, Ipv4Header: 20, Ipv6Header: 40, FragmentHeader: 8, TcpHeader: 20, UdpHeader: 8,
    SctpHeader: 16, IcmpHeader: 8, ArpMessage: 28, NeighbourMessage: 32,
}
