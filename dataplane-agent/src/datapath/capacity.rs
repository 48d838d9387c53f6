//! Capacities of the maps: as configured, or as pinned.

use aya::maps::MapInfo;
use dataplane_common::abi::{
    FlowBlock,
    names::{capacity, map},
};

use super::pins::Pins;

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
/// configured.
#[derive(Debug)]
pub(super) struct Capacities {
    by_map: Vec<(&'static str, u32)>,
    problems: Vec<String>,
}

impl Capacities {
    pub(super) fn effective(pins: &Pins, capacity: &Capacity) -> Self {
        let mut problems = Vec::new();
        let capacities = capacity.by_map().map(|(name, configured)| {
            // without a readable pin the loader creates a new map, or fails and reports why
            let pinned =
                MapInfo::from_pin(pins.map(name)).map_or(configured, |info| info.max_entries());
            if pinned != configured && name != map::FLOW_INDEX && name != map::FLOW_BLOCKS {
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
