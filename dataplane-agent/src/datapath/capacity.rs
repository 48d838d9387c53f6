//! Capacities of the maps: as configured, by the node's memory, or as pinned.

use aya::maps::MapInfo;
use dataplane_common::abi::{
    FlowBlock,
    names::{capacity, map},
};
use nix::sys::sysinfo::sysinfo;

use super::pins::Pins;

const MIB: u64 = 1 << 20;
/// Default capacity of `FLOWS` on nodes with less memory than this. The limits are between the
/// sizes that machines have: the kernel takes some of it before it counts. With these numbers, all
/// tables of a node with 2 GiB take less than 16 MiB, and 30,000 Services on one with 8 GiB less
/// than 48 MiB.
const FLOWS_BY_MEMORY: [(u64, u32); 5] = [
    (1_536 * MIB, 8_192),
    (3 * 1_024 * MIB, 14_336),
    (6 * 1_024 * MIB, 32_768),
    (48 * 1_024 * MIB, 53_248),
    (96 * 1_024 * MIB, 131_072),
];
/// On larger nodes.
const MAX_FLOWS: u32 = 262_144;

/// Number of entries of the maps whose capacity can be configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub endpoints: u32,
    pub routes: u32,
    pub services: u32,
    pub backends: u32,
    pub backend_generations: u32,
    pub flows: u32,
    pub fragments: u32,
    pub datagram_origins: u32,
    pub source_ranges: u32,
    pub affinity: u32,
    /// Size of the ring buffer in bytes, a power of two.
    pub events_bytes: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            endpoints: capacity::ENDPOINTS,
            routes: capacity::ROUTES,
            services: capacity::SERVICES,
            backends: capacity::BACKENDS,
            backend_generations: capacity::BACKEND_GENERATIONS,
            flows: capacity::FLOWS,
            fragments: capacity::FRAGMENTS,
            datagram_origins: capacity::DATAGRAM_ORIGINS,
            source_ranges: capacity::SOURCE_RANGES,
            affinity: capacity::AFFINITY,
            events_bytes: capacity::EVENTS_BYTES,
        }
    }
}

impl Capacity {
    /// The default on this node.
    pub fn of_node() -> Self {
        // fails for no reason that the manual page names
        sysinfo().map_or_else(|_errno| Self::default(), |info| Self::for_memory(info.ram_total()))
    }

    /// The default on a node with `memory` bytes. A limit of the agent's cgroup does not count: the
    /// tables serve the node.
    ///
    /// A table whose memory grows with its entries has the same capacity everywhere, unless its
    /// buckets alone are too large.
    pub fn for_memory(memory: u64) -> Self {
        let of_size = FLOWS_BY_MEMORY.iter().find(|(limit, _)| memory < *limit);
        let flows = of_size.map_or(MAX_FLOWS, |(_, flows)| *flows);
        let size = flows.next_power_of_two();
        Self {
            services: capacity::SERVICES.min(4 * size),
            backends: capacity::BACKENDS.min(8 * size),
            backend_generations: capacity::BACKEND_GENERATIONS.min(8 * size),
            flows,
            fragments: capacity::FRAGMENTS.min(size / 8),
            datagram_origins: capacity::DATAGRAM_ORIGINS.min(size / 4),
            affinity: capacity::AFFINITY.min(size / 4),
            ..Self::default()
        }
    }

    pub(super) fn by_map(&self) -> [(&'static str, u32); 13] {
        [
            (map::ENDPOINTS, self.endpoints),
            (map::ROUTES, self.routes),
            (map::SERVICES, self.services),
            (map::BACKENDS, self.backends),
            (map::BACKEND_GENERATIONS, self.backend_generations),
            (map::FLOWS, self.flows),
            (map::FLOW_BLOCKS, FlowBlock::count(self.flows)),
            // one entry per direction
            (map::FLOW_INDEX, self.flows.saturating_mul(2)),
            (map::FRAGMENTED_PACKETS, self.fragments),
            (map::DATAGRAM_ORIGINS, self.datagram_origins),
            (map::SOURCE_RANGES, self.source_ranges),
            (map::AFFINITY, self.affinity),
            (map::EVENTS, self.events_bytes),
        ]
    }
}

/// The capacities to load with: those of pinned maps, which are kept with their entries, else those
/// configured, else the default.
#[derive(Debug)]
pub(super) struct Capacities {
    by_map: Vec<(&'static str, u32)>,
    problems: Vec<String>,
}

impl Capacities {
    pub(super) fn effective(pins: &Pins, capacity: &Capacity) -> Self {
        let mut problems = Vec::new();
        let defaults = Capacity::of_node().by_map();
        let capacities = capacity.by_map().map(|(name, configured)| {
            // without a readable pin the loader creates a new map, or fails and reports why
            let pinned =
                MapInfo::from_pin(pins.map(name)).map_or(configured, |info| info.max_entries());
            // nobody asked for a default, which differs after an upgrade or with other memory
            let is_default = defaults.contains(&(name, configured));
            if pinned != configured && !is_default && name != map::FLOW_INDEX && name != map::FLOW_BLOCKS {
                problems.push(format!(
                    "map {name} keeps its capacity of {pinned} entries because its entries are in use; the \
                     configured capacity of {configured} takes effect after `dataplane-agent cleanup` or a reboot"
                ));
            }
            (name, pinned)
        });
        let mut capacities = Self { by_map: capacities.to_vec(), problems };
        // one row for each 64 flows, however many there are
        let blocks = FlowBlock::count(capacities.of(map::FLOWS));
        capacities.by_map.retain(|(name, _)| *name != map::FLOW_BLOCKS);
        capacities.by_map.push((map::FLOW_BLOCKS, blocks));
        capacities
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.by_map.iter().copied()
    }

    /// The capacity of a map; 0 if it is not configurable.
    pub(super) fn of(&self, name: &str) -> u32 {
        self.by_map.iter().find(|(map, _)| *map == name).map_or(0, |(_, capacity)| *capacity)
    }

    /// Pinned maps whose capacity is not the configured one.
    pub(super) fn into_problems(self) -> Vec<String> {
        self.problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn capacities_grow_with_the_memory_of_the_node() {
        let flows = |memory| Capacity::for_memory(memory).flows;
        assert_eq!([0, GIB].map(flows), [8_192, 8_192]);
        assert_eq!([2 * GIB, 4 * GIB, 8 * GIB].map(flows), [14_336, 32_768, 53_248]);
        assert_eq!([24 * GIB, 64 * GIB, 128 * GIB, u64::MAX].map(flows), [53_248, 131_072, 262_144, 262_144]);
        let gib: Vec<_> = (1..200).map(|gib| Capacity::for_memory(gib * GIB).by_map()).collect();
        for (less, more) in gib.iter().zip(&gib[1..]) {
            assert!(less.iter().zip(more).all(|(less, more)| less <= more), "{less:?} {more:?}");
        }
    }

    #[test]
    fn machine_has_the_capacities_of_its_size_though_the_kernel_takes_a_part_of_its_memory() {
        for size in [1, 2, 4, 8, 16, 32, 64, 128] {
            let nominal = Capacity::for_memory(size * GIB);
            assert_eq!(Capacity::for_memory(size * GIB * 85 / 100), nominal, "{size} GiB");
        }
    }

    #[test]
    fn services_fit_on_a_small_node() {
        let capacity = Capacity::for_memory(2 * GIB);
        // 30,000 Services with four endpoints: a frontend, and a row of its address
        assert!(capacity.services > 60_000, "{capacity:?}");
        assert!(capacity.backends > 120_000 && capacity.backend_generations > 120_000, "{capacity:?}");
    }
}
