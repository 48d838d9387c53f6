//! `POD_SOURCES`: the address of each pod, by its device.

use super::{Addr, names::capacity};
use crate::abi;

abi! {
    /// Slot of `POD_SOURCES`, an array: an address of the pod behind a device. A shortcut: the rows
    /// of `ENDPOINTS` decide, and an address without a slot is looked up there.
    pub struct PodSource: 20 {
        /// Address of the pod.
        pub addr: Addr,
        /// Host-side device of the pod; 0: the slot is free.
        pub ifindex: u32,
    }
}

impl PodSource {
    /// The slot of a device for one family. Devices whose indexes differ by a multiple of half the
    /// capacity share theirs.
    #[inline(always)]
    pub const fn slot(ifindex: u32, is_v4: bool) -> u32 {
        ifindex.wrapping_mul(2).wrapping_add(is_v4 as u32) % capacity::POD_SOURCES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_devices_and_families_have_slots_of_their_own() {
        let slots_of = |ifindex| [true, false].map(|is_v4| PodSource::slot(ifindex, is_v4));
        let mut slots: Vec<u32> = (3_000..4_000).flat_map(slots_of).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), 2_000);
        assert!(slots.iter().all(|slot| *slot < capacity::POD_SOURCES));
        assert!(PodSource::slot(u32::MAX, true) < capacity::POD_SOURCES);
    }
}
