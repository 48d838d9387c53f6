//! `EVENTS`: outcomes of single packets, shown by `dataplane-agent events`.

use super::FlowKey;
use crate::abi;

abi! {
    /// A record of the ring buffer `EVENTS`.
    pub struct Event: 64 {
        /// `CLOCK_MONOTONIC`, nanoseconds.
        pub timestamp: u64,
        /// Tuple of the packet as far as it could be parsed, zero beyond.
        pub tuple: FlowKey,
        /// Device the program was attached to; 0 for socket hooks.
        pub ifindex: u32,
        /// Length of the packet in bytes.
        pub length: u32,
        /// A [`crate::reason::HookId`].
        pub hook: u8,
        /// Number of the [`crate::reason::Outcome`].
        pub outcome: u8,
        /// Must be 0.
        pub reserved: [u8; 6],
    }
}
