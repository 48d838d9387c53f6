//! `COUNTERS`: packets per hook and outcome, summed over all CPUs.

use aya::maps::{MapData, MapError, PerCpuArray};
use dataplane_common::{
    abi::names::map,
    reason::{DropReason, HookId, Outcome, Verdict, counter_index},
};

use super::{
    maps::{OpenError, open},
    pins::Pins,
};

/// The packet counters of this node.
pub struct Counters {
    map: PerCpuArray<MapData, u64>,
}

/// Number of packets of one hook with one outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    pub hook: HookId,
    pub outcome: Outcome,
    pub packets: u64,
}

impl Counters {
    pub fn open(pins: &Pins) -> Result<Self, OpenError> {
        let (map, _) = open(pins, map::COUNTERS)?;
        Ok(Self { map })
    }

    /// All counters that are not zero.
    pub fn read(&self) -> Result<Vec<Count>, MapError> {
        let mut counts = Vec::new();
        for hook in HookId::ALL.iter().copied() {
            for outcome in outcomes() {
                let packets = self.get(hook, outcome)?;
                if packets != 0 {
                    counts.push(Count { hook, outcome, packets });
                }
            }
        }
        Ok(counts)
    }

    /// One counter.
    pub fn get(&self, hook: HookId, outcome: Outcome) -> Result<u64, MapError> {
        let number = match outcome {
            Outcome::Passed(verdict) => verdict.number(),
            Outcome::Dropped(reason) => reason.number(),
        };
        Ok(self.map.get(&counter_index(hook, number), 0)?.iter().sum())
    }
}

fn outcomes() -> impl Iterator<Item = Outcome> {
    let passed = Verdict::ALL.iter().copied().map(Outcome::Passed);
    passed.chain(DropReason::ALL.iter().copied().map(Outcome::Dropped))
}
