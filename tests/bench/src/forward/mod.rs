//! Forwarding: an outside client sends to a node port of a node, and the backend pod is on another
//! node.
//!
//! ```text
//! generator ─ port ══ eth0 ─ node: new destination, new source, next hop
//! counter   ─ port ══ eth0 ─ ┘
//! ```
//! The other end of the node's veth is a [`wire`], which acts as the rest of the network. It
//! generates packets by XDP, so that the node's driver receives XDP frames as from a network card
//! (packets of a stack would be copied first), and counts those that come back addressed to the
//! other node. [`programs`] are its programs, [`node`] creates the nodes.

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
use wire::{BlockResult, TestPacket};

/// Largest share of lost packets (full queues) in a valid block.
const LOSS_ALLOWED: f64 = 0.01;

/// A node with the packets that are sent to it.
#[derive(Clone)]
pub struct Forwarder {
    node: Rc<Node>,
    packet: TestPacket,
}

impl fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Forwarder").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Forwarder {
    /// Verifies a forwarded packet with its checksums, and that the intended hook forwarded it.
    pub fn verify(&self) -> Result<()> {
        let before = self.node.forwarded_packets()?;
        let frame = self.node.wire.verify(&self.packet)?;
        let found =
            Parsed::read(&frame).map_err(|problem| anyhow!("cannot parse the received packet: {problem}"))?;
        let sent = Parsed::read(&self.packet.sent)
            .map_err(|problem| anyhow!("cannot parse the sent packet: {problem}"))?;
        ensure!(found.payload == sent.payload, "the payload changed: {found:?}");
        let keeps_client = found.src == sent.src;
        ensure!(
            !keeps_client || programs::is_client_port(found.src_port),
            "the source port is not one of the client's: {found:?}"
        );
        let counted = self.node.forwarded_packets()?.zip(before).map(|(after, before)| after - before);
        ensure!(
            counted.is_none_or(|packets| packets >= u64::from(FLOWS) / 2),
            "only {counted:?} packets were forwarded by {}",
            self.node.forwarded_by()
        );
        self.node.check()
    }

    /// Measures one block. Its time is processor time, without the overhead of generating and
    /// counting.
    ///
    /// # Errors
    /// More than 1 % of the packets got lost, or the node's cost is too small to measure.
    pub fn measure(&self, warm_up: Duration, time: Duration) -> Result<Outcome> {
        let block = self.node.wire.measure(&self.packet, warm_up, time)?;
        self.node.check()?;
        outcome(&block).with_context(|| format!("{block:?}"))
    }
}

fn outcome(block: &BlockResult) -> Result<Outcome> {
    let BlockResult { node, overhead, .. } = block;
    let lost = node.sent - node.arrived;
    ensure!(
        lost as f64 <= node.sent as f64 * LOSS_ALLOWED && overhead.arrived == overhead.sent,
        "{lost} of {} packets got lost",
        node.sent
    );
    let seconds = node.processor.as_secs_f64() - overhead.per_packet() * node.arrived as f64;
    let mut each = block.node_seconds.clone();
    each.sort_by(f64::total_cmp);
    let micros = |share: f64| each[((each.len() - 1) as f64 * share).round() as usize] * 1e6;
    let latency = Latency { p50: micros(0.5), p90: micros(0.9), p99: micros(0.99), max: micros(1.0) };
    ensure!(seconds > 0.0 && latency.p50 > 0.0, "the cost of the node is not measurable");
    Ok(Outcome {
        operations: node.arrived,
        seconds,
        per_second: node.arrived as f64 / seconds,
        errors: 0,
        lost,
        overhead: overhead.per_packet() * 1e6,
        latency,
    })
}

#[cfg(test)]
mod tests {
    use super::{wire::PacketCost, *};

    fn block(lost: u64) -> BlockResult {
        let cost = |micros, lost| PacketCost {
            sent: 1_000,
            arrived: 1_000 - lost,
            processor: Duration::from_micros(micros),
        };
        BlockResult {
            node: cost(1_500, lost),
            overhead: cost(500, 0),
            node_seconds: vec![2e-6, 1e-6, 0.5e-6],
        }
    }

    #[test]
    fn overhead_without_a_node_is_subtracted() {
        let outcome = outcome(&block(0)).expect("an outcome");
        assert!((outcome.per_second - 1e6).abs() < 1.0, "{outcome:?}");
        assert!((outcome.latency.p50 - 1.0).abs() < 1e-9 && (outcome.overhead - 0.5).abs() < 1e-9);
    }

    #[test]
    fn block_with_more_than_one_percent_loss_is_invalid() {
        assert_eq!(outcome(&block(10)).expect("an outcome").lost, 10);
        assert!(outcome(&block(11)).is_err());
    }
}
