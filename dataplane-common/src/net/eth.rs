//! Ethernet II.

use crate::abi::MacAddr;

/// Ethernet header, 14 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EthHeader {
    /// Destination.
    pub dst: MacAddr,
    /// Source.
    pub src: MacAddr,
    /// EtherType in network byte order.
    pub ether_type: u16,
}

/// EtherType values.
#[derive(Clone, Copy, Debug)]
pub struct EtherType;

impl EtherType {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// VLAN tag (IEEE 802.1Q).
    pub const VLAN: u16 = 0x8100;
    /// Outer VLAN tag (IEEE 802.1ad).
    pub const VLAN_OUTER: u16 = 0x88a8;

    /// Whether it is a VLAN tag.
    #[inline(always)]
    pub const fn is_vlan(ether_type: u16) -> bool {
        matches!(ether_type, Self::VLAN | Self::VLAN_OUTER)
    }
}

impl EthHeader {
    /// Bytes of the header.
    pub const LEN: usize = 14;

    /// EtherType in host order.
    #[inline(always)]
    pub const fn ether_type(&self) -> u16 {
        u16::from_be(self.ether_type)
    }

    /// Rewrites both addresses.
    #[inline(always)]
    pub const fn set_addresses(&mut self, dst: MacAddr, src: MacAddr) {
        // word by word: the BPF back end compiles a copy of six bytes to a call
        let (to, from) = (dst.words(), src.words());
        self.dst.set_words(to[0], to[1], to[2]);
        self.src.set_words(from[0], from[1], from[2]);
    }
}
