//! `FRAGMENTS`: ports of fragmented packets. A cache (LRU): losing an entry drops one fragmented packet, by name.

use super::{Addr, Port};
use crate::abi;

abi! {
    /// Key of `FRAGMENTS`: what fragments of one packet share (RFC 791 §3.2, RFC 8200 §4.5).
    pub struct FragmentKey: 40 {
        /// Source address.
        pub src: Addr,
        /// Destination address.
        pub dst: Addr,
        /// Identification, as it lies in the packet; IPv4 has 16 bits of it.
        pub id: u32,
        /// IP protocol number.
        pub protocol: u8,
        /// Must be 0.
        pub reserved: [u8; 3],
    }

    /// Value of `FRAGMENTS`: the ports the first fragment carried.
    pub struct FragmentPorts: 4 {
        /// Source port.
        pub src: Port,
        /// Destination port.
        pub dst: Port,
    }
}
