//! What a cluster has to say about a failure: logs, drop counters, events, problems.

use std::fmt::Write as _;

use anyhow::{Error, Result};
use dataplane_agent::api::{
    request::{EventFilter, EventLine, View},
    views::CountView,
};

use super::{agent::Agent, cluster::Cluster, losses::losses, node::Node};

/// Events that are shown of a node.
const EVENTS: usize = 10;

impl Cluster {
    /// Adds to an error what is known: see [`Self::evidence`].
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| Error::context(error, self.evidence()))
    }

    /// What every node knows, and what kernels have counted of losses.
    pub fn evidence(&self) -> String {
        let nodes = self.nodes().iter().map(Node::evidence).collect::<Vec<_>>().join("\n");
        format!("{nodes}\n--- kernels ---\n{}", losses(&self.site().namespace("")))
    }
}

impl Node {
    /// Problems, drops with their counters and last events, and the end of the agent's log.
    pub fn evidence(&self) -> String {
        let mut text = format!("--- {} ---\n", self.name());
        match self.agent().status() {
            Err(error) => text.push_str(&format!("its agent does not answer: {error:#}\n")),
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

    /// Packets of a hook that ended in an outcome, so far.
    pub fn count(&self, hook: &str, outcome: &str) -> Result<u64> {
        let outcomes = self.agent().status()?.outcomes;
        let is_it = |count: &&CountView| count.hook == hook && count.outcome == outcome;
        Ok(outcomes.iter().filter(is_it).map(|count| count.packets).sum())
    }
}

fn line(text: &mut String, what: &str, value: &str) {
    let _written = writeln!(text, "{what}: {value}");
}

/// The last packets that were dropped, as sentences.
fn drops(agent: &Agent) -> Vec<String> {
    let view = View::Events(EventFilter { dropped: true, ..EventFilter::default() });
    let lines = match agent.stream(&view) {
        Ok(lines) => lines,
        Err(error) => return vec![format!("(not readable: {error:#})")],
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
