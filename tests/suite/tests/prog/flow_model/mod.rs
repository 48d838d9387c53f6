//! The flow table against a model of it: random packets of clients and servers, while time passes
//! and backends come and go. After each packet, the packet and every record must be what the model
//! says.
//!
//! The model is written from the RFCs, the decision records and what `nf_conntrack` does, and
//! shares no rule with the datapath: [`connection`] has the life of a connection, [`table`] and
//! [`ports`] the table, [`node`] what the hooks do. Where the datapath selects at random (backends,
//! ports, slots), the model checks the choice and follows it. The clock is simulated: records are
//! made older, and seconds that really pass are taken back.
//!
//! In every fourth sequence the programs examine slots once a second, as they do; in the others for
//! every new flow, so that the model knows which class of slots is taken.
//!
//! A failure prints its seed and the shortest sequence of events that fails.
//! `DATAPLANE_MODEL_SEED` is the first seed, `DATAPLANE_MODEL_SEQUENCES` the number of sequences.

mod agent;
mod clock;
mod connection;
mod drive;
mod events;
mod flow;
mod frames;
mod node;
mod ports;
mod services;
mod table;

use std::{cell::RefCell, collections::BTreeMap, env, ops::RangeInclusive};

use anyhow::{Context as _, Result, anyhow, bail};
use dataplane_testkit::run;
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner},
};

use self::{
    clock::SecondEnded,
    drive::Programs,
    events::{Event, event},
};

/// Sequences of one test.
const SEQUENCES: u64 = 16;
/// Factor with `DATAPLANE_FULL=1`.
const FULL_FACTOR: u64 = 20;
/// Events of a sequence at most.
const EVENTS: usize = 120;

fn number_of(variable: &str) -> Result<Option<u64>> {
    let Some(value) = env::var_os(variable) else { return Ok(None) };
    let number = value.to_string_lossy().parse();
    Ok(Some(number.with_context(|| format!("{variable}: {}", value.display()))?))
}

/// What has happened in all sequences.
#[derive(Default)]
struct Totals {
    packets: u32,
    /// Sequences that were given up, because the machine was too slow.
    interrupted: u64,
    /// How often each rule was applied, and each outcome seen.
    seen: BTreeMap<String, u32>,
}

/// Runs sequences with these ports for masquerade. Returns what they covered.
fn run_sequences(ports: RangeInclusive<u16>) -> Result<BTreeMap<String, u32>> {
    let programs = RefCell::new(Programs::load(ports)?);
    let first = number_of("DATAPLANE_MODEL_SEED")?.unwrap_or(1);
    let default = SEQUENCES * if run::is_full() { FULL_FACTOR } else { 1 };
    let sequences = number_of("DATAPLANE_MODEL_SEQUENCES")?.unwrap_or(default);
    let totals = RefCell::new(Totals::default());
    for seed in first..first + sequences {
        let config = ProptestConfig {
            failure_persistence: None,
            max_shrink_iters: 2_000,
            ..ProptestConfig::default()
        };
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(config, rng);
        let tree = vec(event(), 1..EVENTS).new_tree(&mut runner).map_err(|reason| anyhow!("{reason}"))?;
        let result = runner.run_one(tree, |events| {
            let (mut programs, mut totals) = (programs.borrow_mut(), totals.borrow_mut());
            run_sequence(&mut programs, &mut totals, &events, !seed.is_multiple_of(4))
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))
        });
        if let Err(TestError::Fail(reason, _) | TestError::Abort(reason)) = result {
            panic!("DATAPLANE_MODEL_SEED={seed} DATAPLANE_MODEL_SEQUENCES=1: {reason}");
        }
    }
    let Totals { packets, interrupted, seen } = totals.into_inner();
    run::summarize(&format!(
        "flow model: {packets} packets in {sequences} sequences, of which {interrupted} were interrupted"
    ));
    assert!(interrupted * 2 <= sequences, "the machine is too slow");
    Ok(seen)
}

fn run_sequence(
    programs: &mut Programs,
    totals: &mut Totals,
    events: &[Event],
    is_examined: bool,
) -> Result<()> {
    for attempt in 0..10 {
        // a coarse clock is late by a tick; a slow machine needs longer for a packet
        let window = 20_000_000..900_000_000 - attempt * 80_000_000;
        let mut sequence = programs.begin(is_examined, window)?;
        match sequence.run(events) {
            Err(error) if error.is::<SecondEnded>() => {}
            Err(error) => bail!("{error:#}\n{}", sequence.log.join("\n")),
            Ok(()) => {
                totals.packets += sequence.packets;
                for (what, count) in sequence.seen() {
                    *totals.seen.entry(what).or_default() += count;
                }
                return Ok(());
            }
        }
    }
    totals.interrupted += 1;
    Ok(())
}

/// Fails unless each of these was seen: else the events would have to be changed.
fn assert_covers(seen: &BTreeMap<String, u32>, expected: &[&str]) {
    for what in expected {
        assert!(seen.contains_key(*what), "{what}: {seen:#?}");
    }
}

#[test]
fn flow_table_agrees_with_its_model() -> Result<()> {
    let seen = run_sequences(61_000..=61_999)?;
    if number_of("DATAPLANE_MODEL_SEQUENCES")?.is_none() {
        assert_covers(
            &seen,
            &[
                "slot Free",
                "slot Outside",
                "slot Idle",
                "slot Inside",
                "table full",
                "expired flow",
                "6 Established",
                "6 Closing",
                "6 EndedForward",
                "6 EndedReply",
                "6 Refused",
                "6 Reset",
                "17 Established",
                "132 Established",
                "1 Answered",
                "58 Answered",
                "6 anew, Open",
                "17 anew, Data",
                "xdp_wire to_wire",
                "xdp_wire to_outside",
                "from_wire stack_pod",
                "to_wire masqueraded",
                "error to_pod",
            ],
        );
    }
    Ok(())
}

/// Three ports for each destination: new flows take those of others.
#[test]
fn source_ports_agree_with_the_model() -> Result<()> {
    let seen = run_sequences(61_000..=61_002)?;
    if number_of("DATAPLANE_MODEL_SEQUENCES")?.is_none() {
        assert_covers(&seen, &["port Free", "port Unconfirmed", "from_pod ports_exhausted"]);
    }
    Ok(())
}
