//! VXLAN (RFC 7348).

/// Bytes that VXLAN over IPv4 adds to an IP packet: inner Ethernet, VXLAN, UDP, IPv4.
pub const VXLAN_OVERHEAD: u32 = 14 + 8 + 8 + 20;
