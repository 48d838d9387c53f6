//! Nodes that send packets round: a client outside asks a port of a node, and the pod that answers is on another node.
//!
//! ```text
//! generator ─ port ══ eth0 ─ the node: new destination, new source, next hop
//! counter   ─ port ══ eth0 ─ ┘
//! ```
//! The node's only cable ends at a [`wire`], which stands for everything else: it makes the packets in its driver, so that the
//! node's driver gets them as a network card's would (what a stack has made would be copied first), and counts those that
//! come back addressed to the other node. [`programs`] are its programs, made of [`assembly`], loaded by [`kernel`].
//! [`node`] makes the nodes.

mod assembly;
mod kernel;
mod node;
mod programs;
mod wire;

use std::{fmt, rc::Rc, time::Duration};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::load::{Latency, Outcome};
use dataplane_testkit::prog::Parsed;
use node::Node;
pub use node::Nodes;
pub use programs::FLOWS;
use wire::{Aim, Turns};

/// Share of packets that may get lost between two full queues before a block says nothing.
const LOSS_ALLOWED: f64 = 0.01;

/// A node, asked in one way.
#[derive(Clone)]
pub struct Forwarder {
    node: Rc<Node>,
    aim: Aim,
}

impl fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Forwarder").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Forwarder {
    /// What arrives is right to the last checksum, and the node did it the way it is to be measured for.
    pub fn prove(&self) -> Result<()> {
        let before = self.node.sent_round()?;
        let frame = self.node.wire.prove(&self.aim)?;
        let found = Parsed::read(&frame).map_err(|problem| anyhow!("what arrives: {problem}"))?;
        let sent = Parsed::read(&self.aim.sent).map_err(|problem| anyhow!("what is sent: {problem}"))?;
        ensure!(found.payload == sent.payload, "what arrives is not what was sent: {found:?}");
        let keeps_client = found.src == sent.src;
        ensure!(
            !keeps_client || programs::is_client_port(found.src_port),
            "what arrives is from nobody's port: {found:?}"
        );
        let counted = self.node.sent_round()?.zip(before).map(|(after, before)| after - before);
        ensure!(
            counted.is_none_or(|packets| packets >= u64::from(FLOWS) / 2),
            "packets arrive, and only {counted:?} passed {}",
            self.node.way()
        );
        self.node.check()
    }

    /// One block. A second is one of processor time, less what the packets cost without a node.
    ///
    /// # Errors
    /// Where more than a hundredth gets lost, or the node's part is too small to be told from the rest.
    pub fn ask(&self, warm_up: Duration, time: Duration) -> Result<Outcome> {
        let turns = self.node.wire.measure(&self.aim, warm_up, time)?;
        self.node.check()?;
        outcome(&turns).with_context(|| format!("{turns:?}"))
    }
}

fn outcome(turns: &Turns) -> Result<Outcome> {
    let Turns { node, nowhere, .. } = turns;
    let lost = node.sent - node.arrived;
    ensure!(
        lost as f64 <= node.sent as f64 * LOSS_ALLOWED && nowhere.arrived == nowhere.sent,
        "of {} packets {lost} got lost",
        node.sent
    );
    let seconds = node.processor.as_secs_f64() - nowhere.each() * node.arrived as f64;
    let mut each = turns.each.clone();
    each.sort_by(f64::total_cmp);
    let micros = |share: f64| each[((each.len() - 1) as f64 * share).round() as usize] * 1e6;
    let latency = Latency { p50: micros(0.5), p90: micros(0.9), p99: micros(0.99), max: micros(1.0) };
    ensure!(seconds > 0.0 && latency.p50 > 0.0, "a node seems to cost nothing");
    Ok(Outcome {
        operations: node.arrived,
        seconds,
        per_second: node.arrived as f64 / seconds,
        errors: 0,
        lost,
        overhead: nowhere.each() * 1e6,
        latency,
    })
}

#[cfg(test)]
mod tests {
    use super::{wire::Spent, *};

    fn turns(lost: u64) -> Turns {
        let spent = |micros, lost| Spent {
            sent: 1_000,
            arrived: 1_000 - lost,
            processor: Duration::from_micros(micros),
        };
        Turns { node: spent(1_500, lost), nowhere: spent(500, 0), each: vec![2e-6, 1e-6, 0.5e-6] }
    }

    #[test]
    fn what_packets_cost_without_a_node_is_taken_off() {
        let outcome = outcome(&turns(0)).expect("an outcome");
        assert!((outcome.per_second - 1e6).abs() < 1.0, "{outcome:?}");
        assert!((outcome.latency.p50 - 1.0).abs() < 1e-9 && (outcome.overhead - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_block_that_loses_packets_is_none() {
        assert_eq!(outcome(&turns(10)).expect("an outcome").lost, 10);
        assert!(outcome(&turns(11)).is_err());
    }
}
