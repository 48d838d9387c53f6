//! Measures programs on the packets of scenarios.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{prog::Rig, sys_bpf::Output};
use nix::time::{ClockId, clock_gettime};

use super::{
    peers::{self, LoadedPeers, Peers},
    scenarios::{self, ESTABLISHED_SLOTS, Limit, NEW_SLOTS, Scenario},
    wrapper::{self, Wrapper},
};
use crate::{
    bpf::{kernel::Program, programs},
    load::{Latency, Outcome},
    plan::Variant,
};

/// Runs between two clock readings: about a millisecond.
const SLICE: u32 = 8_192;
/// Slices of a block of new flows: a quarter of the flow table.
const NEW_SLICES: usize = 4;
/// Blocks of new flows after which every slot of the flow table has been used.
const BLOCKS_PER_TABLE: usize = 5;
/// Seconds by which flows are made older: more than any timeout.
const AGE: u32 = 1_000_000;
/// Largest share of packets with another outcome: XDP leaves one a second to tc.
const OTHERS_ALLOWED: f64 = 0.001;
/// Attempts to see a packet that XDP does not leave to tc.
const ATTEMPTS: usize = 20;
/// Seconds of a program that is too small to measure.
const SMALLEST: f64 = 0.1e-9;

/// The loaded programs, and the wrappers that call them.
pub(super) struct Runner {
    /// For connections that exist.
    established: Rig,
    /// For new flows; its flow table is full of flows that have ended.
    new: Rig,
    peers: LoadedPeers,
    scenarios: Vec<Scenario>,
    prepared: BTreeMap<usize, Prepared>,
}

/// The wrappers of a scenario.
struct Prepared {
    context: Vec<u8>,
    /// Calls no program.
    overhead: Wrapper,
    by_variant: BTreeMap<Variant, Wrapper>,
    _limit: Program,
}

/// Processor time of some packets.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    packets: u64,
    seconds: f64,
}

impl Cost {
    fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.seconds += other.seconds;
    }

    fn per_packet(&self) -> f64 {
        self.seconds / self.packets.max(1) as f64
    }
}

impl Runner {
    pub(super) fn create(peers: &Peers) -> Result<Self> {
        Ok(Self {
            established: scenarios::load(ESTABLISHED_SLOTS)?,
            new: scenarios::load(NEW_SLOTS)?,
            peers: LoadedPeers::load(peers)?,
            scenarios: scenarios::all(),
            prepared: BTreeMap::new(),
        })
    }

    /// Opens the connections of a scenario and loads its wrappers.
    fn prepare(&mut self, index: usize) -> Result<Prepared> {
        let scenario = &mut self.scenarios[index];
        let rig = if scenario.is_new { &mut self.new } else { &mut self.established };
        scenario.establish(rig)?;
        let (kind, frame, rotation) = (scenario.kind(), scenario.frame.clone(), scenario.rotation);
        let (context, uplink) = (scenario.context(rig)?, rig.ifindex);
        let load = |program| Wrapper::load(kind, &frame, rotation, program);
        let overhead = load(None)?;
        let program = rig.program(scenario.hook)?;
        let ours = load(Some(program))?;
        // the limit makes the packet what ours makes it
        let output = usual(scenario, || ours.run(&frame, &context, 1))?;
        let limit = match scenario.limit {
            Limit::Rewrite => wrapper::rewrite(kind, &frame, &output.frame, scenario.limit_returns()),
            Limit::Redirect => programs::redirect(uplink),
            Limit::Empty => programs::empty(scenario.limit_returns()),
        };
        let limit = Program::load("limit", kind, &limit)?;
        let mut by_variant = BTreeMap::from([
            (Variant::Ours, ours),
            (super::limit(scenario), load(Some(limit.descriptor()))?),
        ]);
        for peer in super::peer(scenario) {
            if let Some(program) = self.peers.program(*peer)? {
                by_variant.insert(*peer, load(Some(program))?);
            }
        }
        Ok(Prepared { context, overhead, by_variant, _limit: limit })
    }

    /// Measures one block.
    pub(super) fn measure(
        &mut self,
        index: usize,
        variant: Variant,
        warm_up: Duration,
        time: Duration,
    ) -> Result<Outcome> {
        if !self.prepared.contains_key(&index) {
            let prepared = self.prepare(index)?;
            self.prepared.insert(index, prepared);
            if self.scenarios[index].is_new {
                for _ in 0..BLOCKS_PER_TABLE {
                    self.measure(index, Variant::Ours, Duration::ZERO, Duration::ZERO)?;
                }
            }
        }
        let scenario = &self.scenarios[index];
        let prepared = &self.prepared[&index];
        let wrapper = prepared.by_variant.get(&variant).context("the variant has no program")?;
        let fills_table = scenario.is_new && variant == Variant::Ours;
        let rig = if scenario.is_new { &mut self.new } else { &mut self.established };
        if fills_table {
            rig.age_flows(|flow| flow.last_seen = flow.last_seen.saturating_sub(AGE))?;
        }
        let before = rig.packets(scenario.hook, scenario.outcome)?;
        let started = Instant::now();
        let (mut overhead, mut packets) = (Cost::default(), 0);
        let mut slices = Vec::new();
        let mut warm = warm_up.is_zero() || fills_table;
        let last = loop {
            let (without, _) = slice(&prepared.overhead, scenario, &prepared.context)?;
            let (with, output) = slice(wrapper, scenario, &prepared.context)?;
            if !warm {
                warm = started.elapsed() >= warm_up;
                continue;
            }
            overhead.add(without);
            packets += with.packets;
            slices.push(with.per_packet() - without.per_packet());
            let is_done =
                if fills_table { slices.len() >= NEW_SLICES } else { started.elapsed() >= warm_up + time };
            if is_done {
                break output;
            }
        };
        match variant {
            Variant::Ours => {
                let (handled, usual) = rig.packets(scenario.hook, scenario.outcome)?;
                check_counts(handled - before.0, usual - before.1, scenario.outcome)?;
                let mut last = Some(last);
                let output = self::usual(scenario, || match last.take() {
                    Some(last) => Ok(last),
                    None => wrapper.run(&scenario.frame, &prepared.context, 1),
                })?;
                scenario.check(&output.frame)?;
            }
            Variant::Katran | Variant::Calico => peers::check(variant, scenario, &last)?,
            _ => ensure!(
                last.returned == scenario.limit_returns(),
                "the limit's program returned {}",
                last.returned
            ),
        }
        Ok(outcome(overhead, packets, slices))
    }
}

/// Checks how many packets had the scenario's outcome.
fn check_counts(packets: u64, usual: u64, outcome: &str) -> Result<()> {
    let others = packets - usual;
    ensure!(
        packets > 0 && others as f64 <= (packets as f64 * OTHERS_ALLOWED).max(1.0),
        "{others} of {packets} packets did not have the outcome {outcome}"
    );
    Ok(())
}

/// Calls `run` until our program returns what the scenario says.
fn usual(scenario: &Scenario, mut run: impl FnMut() -> Result<Output>) -> Result<Output> {
    let mut output = run()?;
    for _ in 0..ATTEMPTS {
        if output.returned == scenario.returned {
            return Ok(output);
        }
        output = run()?;
    }
    ensure!(
        output.returned == scenario.returned,
        "the program returned {}, not {}",
        output.returned,
        scenario.returned
    );
    Ok(output)
}

fn slice(wrapper: &Wrapper, scenario: &Scenario, context: &[u8]) -> Result<(Cost, Output)> {
    let before = processor_time()?;
    let output = wrapper.run(&scenario.frame, context, SLICE)?;
    let seconds = processor_time()?.saturating_sub(before).as_secs_f64();
    Ok((Cost { packets: SLICE.into(), seconds }, output))
}

fn processor_time() -> Result<Duration> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?))
}

/// The median of the slices is the result, because an interruption costs more than most programs.
/// `slices`: seconds per packet without overhead.
fn outcome(overhead: Cost, packets: u64, mut slices: Vec<f64>) -> Outcome {
    slices.sort_by(f64::total_cmp);
    let seconds = |share: f64| slices[((slices.len() - 1) as f64 * share).round() as usize].max(SMALLEST);
    let each = seconds(0.5);
    let micros = |share: f64| seconds(share) * 1e6;
    Outcome {
        operations: packets,
        seconds: each * packets as f64,
        per_second: 1.0 / each,
        errors: 0,
        lost: 0,
        overhead: overhead.per_packet() * 1e6,
        latency: Latency { p50: micros(0.5), p90: micros(0.9), p99: micros(0.99), max: micros(1.0) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_the_slices_is_the_result() {
        let overhead = Cost { packets: 1_000, seconds: 20e-6 };
        let found = outcome(overhead, 3_000, vec![900e-9, 90e-9, 100e-9]);
        assert!((found.per_second - 1e7).abs() < 1.0, "{found:?}");
        assert!((found.latency.p50 - 0.1).abs() < 1e-9 && (found.overhead - 0.02).abs() < 1e-9);
    }

    #[test]
    fn program_that_costs_nothing_has_a_rate() {
        assert!(outcome(Cost::default(), 1_000, vec![-1e-9]).per_second.is_finite());
    }

    #[test]
    fn packets_with_another_outcome_fail_the_block() {
        assert!(check_counts(10_000, 9_990, "to_wire").is_ok());
        assert!(check_counts(10_000, 9_900, "to_wire").is_err());
        assert!(check_counts(0, 0, "to_wire").is_err());
    }
}
