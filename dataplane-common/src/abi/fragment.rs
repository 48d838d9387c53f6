//! `FRAGMENTED_PACKETS` and `REORDER_FRAGMENTS`: ports of fragmented packets, and fragments that
//! arrived before the ports. LRU caches: losing an entry drops one fragmented packet.

use super::{Addr, Port};
use crate::abi;

abi! {
    /// Key of `FRAGMENTED_PACKETS`: what the fragments of one packet share (RFC 791 §3.2, RFC 8200
    /// §4.5), and the hook that sees them, because it counts them.
    pub struct FragmentKey: 40 {
        /// Source address.
        pub src: Addr,
        /// Destination address.
        pub dst: Addr,
        /// Identification, as it lies in the packet; IPv4 has 16 bits of it.
        pub id: u32,
        /// IPv4: protocol number. IPv6: 0, because extension headers of the first fragment come
        /// before it.
        pub protocol: u8,
        /// A [`crate::reason::HookId`].
        pub hook: u8,
        /// Must be 0.
        pub reserved: [u8; 2],
    }

    /// Value of `FRAGMENTED_PACKETS`: what the first fragment carried. The entry is removed with
    /// the last fragment, so that a packet that re-uses the identification does not get its ports.
    pub struct FragmentedPacket: 20 {
        /// Source port.
        pub src_port: Port,
        /// Destination port.
        pub dst_port: Port,
        /// Seconds of `CLOCK_MONOTONIC` when the first fragment arrived.
        pub received_at: u32,
        /// Bytes of the fragments so far, without headers.
        pub seen: u32,
        /// Bytes of the whole packet, without headers; 0 until its end is known.
        pub length: u32,
        /// Protocol of the transport header.
        pub protocol: u8,
        /// Must be 0.
        pub reserved: u8,
        /// Bits of the datapath's `parse::Transport`, without TCP flags.
        pub transport: u16,
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
