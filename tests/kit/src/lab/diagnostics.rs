//! Diagnostics of a cluster after a failure: logs, drop counters, events, problems.

use std::fmt::Write as _;

use anyhow::{Error, Result};
use dataplane_agent::api::{
    request::{EventFilter, EventLine, View},
    views::CountView,
};

use super::{agent::Agent, cluster::Cluster, losses::losses, node::Node};

/// Number of events shown per node.
const EVENTS: usize = 10;

impl Cluster {
    /// Adds the cluster's diagnostics to an error.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| Error::context(error, self.diagnostics()))
    }

    /// Diagnostics of every node, and the kernel's loss counters.
    pub fn diagnostics(&self) -> String {
        let nodes = self.nodes().iter().map(Node::diagnostics).collect::<Vec<_>>().join("\n");
        format!("{nodes}\n--- kernels ---\n{}", losses(&self.resources().namespace("")))
    }
}

impl Node {
    /// Problems, drop counters, the last drop events, and the end of the agent's log.
    pub fn diagnostics(&self) -> String {
        let mut text = format!("--- {} ---\n", self.name());
        match self.agent().status() {
            Err(error) => text.push_str(&format!("the agent does not respond: {error:#}\n")),
            Ok(status) => {
                for not_ready in &status.status.not_ready {
                    line(&mut text, "not ready", &format!("{}: {}", not_ready.check, not_ready.reason));
                }
                for problem in &status.status.problems {
                    line(&mut text, "problem", &format!("{}: {}", problem.subject, problem.message));
                }
                for count in status.outcomes.iter().filter(|count| count.dropped) {
                    line(
                        &mut text,
                        "dropped",
                        &format!("{} {} in {}", count.packets, count.outcome, count.hook),
                    );
                }
                for event in drops(self.agent()) {
                    line(&mut text, "event", &event);
                }
            }
        }
        let _written = write!(text, "log:\n{}", self.agent().log_tail());
        text
    }

    /// Number of packets with this verdict or drop reason at a hook.
    pub fn count(&self, hook: &str, outcome: &str) -> Result<u64> {
        let outcomes = self.agent().status()?.outcomes;
        let matches = |count: &&CountView| count.hook == hook && count.outcome == outcome;
        Ok(outcomes.iter().filter(matches).map(|count| count.packets).sum())
    }
}

fn line(text: &mut String, what: &str, value: &str) {
    let _written = writeln!(text, "{what}: {value}");
}

/// The last drop events, as JSON.
fn drops(agent: &Agent) -> Vec<String> {
    let view = View::Events(EventFilter { dropped: true, ..EventFilter::default() });
    let lines = match agent.stream(&view) {
        Ok(lines) => lines,
        Err(error) => return vec![format!("(cannot read events: {error:#})")],
    };
    let events: Vec<String> = lines
        .into_iter()
        .filter_map(|line| match line {
            EventLine::Event(event) => Some(serde_json::to_string(&event).unwrap_or_default()),
            EventLine::Lost(_) | EventLine::End => None,
        })
        .collect();
    events.into_iter().rev().take(EVENTS).collect()
}
