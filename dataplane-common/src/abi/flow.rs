//! `FLOW_INDEX`, `FLOWS`, `FLOW_BLOCKS`: translation state of connections that are translated per
//! packet (ADR 0002, ADR 0010).
//!
//! A flow is one record in the array `FLOWS`. Two entries of the hash `FLOW_INDEX` lead to it: the
//! tuple of packets in the forward direction, and the tuple replies arrive with. Both refer to the
//! record and its epoch; if the record's epoch differs, it has been re-used for another flow, and
//! the index entry is a miss. So both directions expire together.
//!
//! To create a flow, the datapath looks for a slot whose flow may be replaced
//! ([`crate::flow::SlotClass`]). It examines blocks of 64 slots and remembers in `FLOW_BLOCKS` what
//! it found, so that most flows take a slot from there. One program at a time takes a slot of a
//! block (`FlowBlock::claims`). Nothing depends on the agent: there is no garbage collector in
//! user space.

use super::{Addr, Port};
use crate::abi;

abi! {
    /// Key of `FLOW_INDEX`: a packet's tuple as it arrives, before translation.
    pub struct FlowKey: 40 {
        /// Source address.
        pub src: Addr,
        /// Destination address.
        pub dst: Addr,
        /// Source port; ICMP: the echo identifier.
        pub src_port: Port,
        /// Destination port; ICMP: the echo identifier.
        pub dst_port: Port,
        /// IP protocol number.
        pub protocol: u8,
        /// Must be 0.
        pub reserved: [u8; 3],
    }

    /// Value of `FLOW_INDEX`.
    pub struct FlowRef: 8 {
        /// Index into `FLOWS`.
        pub slot: u32,
        /// [`Flow::epoch`] when the entry was made.
        pub epoch: u32,
    }

    /// Value of `FLOWS`, an array.
    ///
    /// The translation is the difference of the two tuples: a forward packet leaves with `reply`
    /// reversed, a reply leaves with `forward` reversed.
    pub struct Flow: 116 {
        /// Tuple of forward packets as they arrive.
        pub forward: FlowKey,
        /// Tuple of replies as they arrive.
        pub reply: FlowKey,
        /// Even: the record is complete. Odd: it is being written. Changes with every re-use; 0:
        /// never used.
        pub epoch: u32,
        /// Number of the selected backend, index into `BACKEND_GENERATIONS`.
        pub backend_id: u32,
        /// Generation of that number when it was selected; a different one means that the backend
        /// has been removed.
        pub backend_generation: u32,
        /// Number of the service, 0 for masquerade.
        pub service_id: u32,
        /// Seconds of `CLOCK_MONOTONIC` of the last packet in either direction.
        pub last_seen: u32,
        /// Seconds of `CLOCK_MONOTONIC` of the first packet.
        pub created: u32,
        /// A [`crate::flow::State`].
        pub state: u32,
        /// Bits of [`FlowFlags`].
        pub flags: u32,
        /// Must be 0.
        pub reserved: u32,
    }

    /// Value of `FLOW_BLOCKS`, an array: what the last examination of 64 slots of `FLOWS` found.
    /// The bits are hints: a slot is examined again before it is taken.
    pub struct FlowBlock: 48 {
        /// For each [`crate::flow::SlotClass`] but the last, a bit for each slot of that class that
        /// has not been taken since.
        pub slots: [u64; 4],
        /// Number of programs that take a slot of the block or try to. One that finds 1 after its
        /// own increment may take one.
        pub claims: u64,
        /// Seconds of `CLOCK_MONOTONIC` from which on another examination may find more.
        pub due: u32,
        /// For each class, the place behind the slot that was taken last: slots of a class are
        /// taken in turn.
        pub next: [u8; 4],
    }
}

impl FlowBlock {
    /// Slots of a block.
    pub const SLOTS: u32 = 64;
    /// Classes of slots that a block lists.
    pub const CLASSES: u32 = 4;

    /// Blocks of a table with this many slots.
    pub const fn count(slots: u32) -> u32 {
        slots.div_ceil(Self::SLOTS)
    }
}

/// Bits of [`Flow::flags`].
#[derive(Clone, Copy, Debug)]
pub struct FlowFlags;

impl FlowFlags {
    /// A backend was selected: `backend_id` and `backend_generation` are set.
    pub const SERVICE: u32 = 1;
    /// The source is translated too (masquerade, hairpin, SNAT to the node, port conflict).
    pub const SOURCE: u32 = 2;
    /// Direct server return: forward packets go to the backend's node unchanged, which translates
    /// them and answers the client. No reply passes this node, and `FLOW_INDEX` has no entry for
    /// `reply`.
    pub const DIRECT: u32 = 4;
    /// Nothing is translated: a client outside of the cluster addressed the pod itself, and the
    /// pod's answers must keep its address.
    pub const INBOUND: u32 = 8;
    /// Masqueraded after the kernel's stack had forwarded it: answers take the stack, too. Follows
    /// the last packet of the pod.
    pub const STACK: u32 = 16;
    /// Created by a packet from outside of the node.
    pub const OUTSIDE: u32 = 32;
}

impl FlowKey {
    /// A tuple.
    #[inline(always)]
    pub const fn new(protocol: u8, src: Addr, src_port: Port, dst: Addr, dst_port: Port) -> Self {
        Self { src, dst, src_port, dst_port, protocol, reserved: [0; 3] }
    }

    /// The tuple of the opposite direction.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self::new(self.protocol, self.dst, self.dst_port, self.src, self.src_port)
    }
}
