//! `FRAGMENTS` and `REORDER_FRAGMENTS`: ports of fragmented packets, and fragments that arrived
//! before the ports. LRU caches: losing an entry drops one fragmented packet.

use super::{Addr, Port};
use crate::abi;

abi! {
    /// Key of `FRAGMENTS`: what the fragments of one packet share (RFC 791 §3.2, RFC 8200 §4.5).
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
    pub struct FragmentPorts: 8 {
        /// Source port.
        pub src: Port,
        /// Destination port.
        pub dst: Port,
        /// Seconds of `CLOCK_MONOTONIC`.
        pub received_at: u32,
    }

    /// Key of `REORDER_FRAGMENTS`: a fragment that arrived before the first one of its packet.
    pub struct ReorderKey: 44 {
        /// The packet it belongs to.
        pub packet: FragmentKey,
        /// Position among the buffered fragments of that packet, from 0, without gaps.
        pub index: u32,
    }
}

/// Seconds for which the ports and buffered fragments of a packet are valid: the kernel's
/// reassembly timeout (`net.ipv4.ipfrag_time`).
pub const FRAGMENT_TIMEOUT_SECS: u32 = 30;
