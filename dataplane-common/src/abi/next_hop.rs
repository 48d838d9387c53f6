//! `FLOW_NEXT_HOPS`, `FORWARDING_GENERATION`: the next hop that a flow has cached (ADR 0011).
//!
//! The next hop of a packet follows from its tuple, the tables and the kernel's routes and
//! neighbours. The datapath caches it for the rest of the second, so that the packets in between
//! need no lookup but that of their flow. A change of a table, or of the kernel's network
//! configuration, advances `FORWARDING_GENERATION`, and no next hop of an earlier generation is
//! used.

use super::MacAddr;
use crate::abi;

abi! {
    /// Value of `FLOW_NEXT_HOPS`, an array with two entries for each slot of `FLOWS`:
    /// [`CachedNextHop::index`].
    pub struct CachedNextHop: 40 {
        /// [`Flow::epoch`](super::Flow::epoch) of the flow it belongs to; 0: there is none.
        pub epoch: u32,
        /// The entry of `FORWARDING_GENERATION` from before it was found.
        pub generation: u32,
        /// Second of `CLOCK_MONOTONIC` in which it was found.
        pub second: u32,
        /// Device that the packets arrive on.
        pub ingress: u32,
        /// Device that they leave by: an uplink, or the host-side device of a pod, whose other end
        /// they enter.
        pub egress: u32,
        /// Destination of the frame.
        pub dst_mac: MacAddr,
        /// Source of the frame.
        pub src_mac: MacAddr,
        /// Longest IP packet in bytes; 0: any.
        pub mtu: u16,
        /// Number of the [`Verdict`](crate::reason::Verdict); [`CachedNextHop::NONE`]: the packets
        /// have no next hop that can be cached.
        pub verdict: u16,
        /// Makes the entry recognisable as one that no other CPU was writing
        /// ([`CachedNextHop::is_intact`]).
        pub checksum: u32,
    }
}

impl CachedNextHop {
    /// The packets have no next hop that can be cached.
    pub const NONE: u16 = 0;

    /// Entry for a flow's slot and direction.
    #[inline(always)]
    pub const fn index(slot: u32, is_reply: bool) -> u32 {
        slot.wrapping_mul(2).wrapping_add(is_reply as u32)
    }

    /// Whether an IP packet of `length` bytes may take it.
    #[inline(always)]
    pub const fn fits(&self, length: u32) -> bool {
        self.mtu == 0 || length <= self.mtu as u32
    }

    /// The entry with its checksum.
    #[inline(always)]
    #[must_use]
    pub const fn with_checksum(mut self) -> Self {
        self.checksum = self.sum();
        self
    }

    /// Whether all of it was written by the same CPU.
    #[inline(always)]
    pub const fn is_intact(&self) -> bool {
        self.checksum == self.sum()
    }

    /// Exclusive or of all other words. The numbers that differ by little between two entries are
    /// rotated, so that their differences do not cancel out.
    #[inline(always)]
    const fn sum(&self) -> u32 {
        let (dst, src) = (self.dst_mac.words(), self.src_mac.words());
        self.epoch
            ^ self.second
            ^ self.generation.rotate_left(8)
            ^ self.egress.rotate_left(16)
            ^ self.ingress.rotate_left(24)
            ^ pair(dst[0], dst[1])
            ^ pair(dst[2], src[0])
            ^ pair(src[1], src[2])
            ^ pair(self.mtu, self.verdict)
    }
}

#[inline(always)]
const fn pair(a: u16, b: u16) -> u32 {
    (a as u32) << 16 | b as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_of_two_entries_is_recognised() {
        let old = CachedNextHop {
            epoch: 2,
            generation: 7,
            second: 1_000,
            ingress: 3,
            egress: 9,
            dst_mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
            src_mac: MacAddr::new([2, 0, 0, 0, 0, 2]),
            mtu: 1_500,
            verdict: 2,
            checksum: 0,
        }
        .with_checksum();
        assert!(old.is_intact());
        assert!(!CachedNextHop::default().with_checksum().eq(&old));
        for mixed in [
            CachedNextHop { epoch: 4, ..old },
            CachedNextHop { generation: 8, ..old },
            CachedNextHop { second: 1_001, ..old },
            CachedNextHop { ingress: 4, ..old },
            CachedNextHop { egress: 10, ..old },
            CachedNextHop { dst_mac: MacAddr::new([2, 0, 0, 0, 0, 9]), ..old },
            CachedNextHop { src_mac: MacAddr::new([2, 0, 0, 0, 0, 9]), ..old },
            CachedNextHop { mtu: 9_000, ..old },
            CachedNextHop { verdict: 1, ..old },
        ] {
            assert!(!mixed.is_intact(), "{mixed:?}");
        }
    }

    #[test]
    fn each_direction_of_a_slot_has_its_entry() {
        assert_eq!(
            [CachedNextHop::index(0, false), CachedNextHop::index(0, true), CachedNextHop::index(1, false)],
            [0, 1, 2]
        );
    }
}
