//! `FRAGMENTS` and `REORDER_FRAGMENTS`: ports of fragmented packets, and what came before they were known. Caches (LRU): losing an
//! entry drops one fragmented packet.

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
        /// When it came: seconds of `CLOCK_MONOTONIC`.
        pub received_at: u32,
    }

    /// Key of `REORDER_FRAGMENTS`: a fragment that came before its first.
    pub struct ReorderKey: 44 {
        /// Of which packet.
        pub packet: FragmentKey,
        /// Which of those that are held of it, from 0, without a gap.
        pub index: u32,
    }
}

/// Seconds after which the rest of a packet is not waited for: as long as a receiver does (`net.ipv4.ipfrag_time`).
pub const FRAGMENT_TIMEOUT_SECS: u32 = 30;
