//! ARP for IPv4 over Ethernet (RFC 826).

use crate::abi::MacAddr;

/// ARP message, 28 bytes. IPv4 addresses are halves, because the message lies 14 bytes into the
/// frame: as words they would not have their alignment.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ArpMessage {
    /// Hardware type, protocol type, and the length of both addresses, network byte order.
    pub format: [u16; 3],
    /// 1: request, 2: reply; network byte order.
    pub operation: u16,
    /// Link address of the sender.
    pub sender_mac: MacAddr,
    /// IPv4 address of the sender.
    pub sender_ip: [u16; 2],
    /// Link address of the target.
    pub target_mac: MacAddr,
    /// IPv4 address of the target.
    pub target_ip: [u16; 2],
}

impl ArpMessage {
    /// `format` of Ethernet and IPv4.
    pub const ETHERNET_IPV4: [u16; 3] = [1_u16.to_be(), 0x0800_u16.to_be(), 0x0604_u16.to_be()];
    /// `operation` of a request.
    pub const REQUEST: u16 = 1_u16.to_be();
    /// `operation` of a reply.
    pub const REPLY: u16 = 2_u16.to_be();

    /// The bytes of an IPv4 address as they lie in the message.
    #[inline(always)]
    pub const fn ip([a, b, c, d]: [u8; 4]) -> [u16; 2] {
        [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
    }
}
