//! How long it takes until what was heard is in the tables.
//!
//! Two clocks: from the event's arrival here, and from the change in the cluster that led to it, which the control plane
//! writes into EndpointSlices (`endpoints.kubernetes.io/last-change-trigger-time`). The second is what kube-proxy calls
//! network programming (KEP-1023's SLI), and is as good as the clocks of the two machines. What was there when the agent
//! started counts for neither.

use std::{
    collections::VecDeque,
    time::{Instant, SystemTime},
};

use crate::{
    metrics::ProgrammingLatency as Seconds,
    state::{Object, SourceEvent},
};

/// More than this many events are not followed at once: one that never gets into the tables must not cost memory.
const FOLLOWED: usize = 16_384;

/// Events on their way into the tables.
#[derive(Debug)]
pub(super) struct ProgrammingLatency {
    seconds: Seconds,
    under_way: VecDeque<WatchEvent>,
}

#[derive(Debug)]
struct WatchEvent {
    /// Revision of the state with the event.
    revision: u64,
    at: Instant,
    /// Of an EndpointSlice that says so.
    trigger: Option<SystemTime>,
}

impl ProgrammingLatency {
    pub(super) fn new(seconds: Seconds) -> Self {
        Self { seconds, under_way: VecDeque::new() }
    }

    /// When the change happened that led to this event, as far as it says so.
    pub(super) fn trigger(event: &SourceEvent) -> Option<SystemTime> {
        match event {
            SourceEvent::Upsert(Object::EndpointSlice(slice)) => slice.trigger_time,
            _ => None,
        }
    }

    /// An event came at `at`, and made this revision of the state.
    pub(super) fn heard(&mut self, revision: u64, at: Instant, trigger: Option<SystemTime>) {
        if self.under_way.len() < FOLLOWED {
            self.under_way.push_back(WatchEvent { revision, at, trigger });
        }
    }

    /// Everything up to this revision is in the tables.
    pub(super) fn applied(&mut self, revision: u64, now: Instant, clock: SystemTime) {
        while let Some(heard) = self.under_way.pop_front_if(|heard| heard.revision <= revision) {
            self.seconds.from_event.observe(now.saturating_duration_since(heard.at).as_secs_f64());
            if let Some(trigger) = heard.trigger {
                // a trigger in the future is that of a machine whose clock is ahead
                let took = clock.duration_since(trigger).unwrap_or_default();
                self.seconds.from_trigger.observe(took.as_secs_f64());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::watch;

    use super::*;
    use crate::{api::views::Status, metrics::Metrics};

    #[test]
    fn an_event_counts_once_it_is_in_the_tables() {
        let metrics = Metrics::new(watch::channel(Status::starting("n")).1);
        let mut programming = ProgrammingLatency::new(metrics.programming());
        let (start, clock) = (Instant::now(), SystemTime::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        programming.heard(1, start, Some(clock - Duration::from_secs(3)));
        programming.heard(2, later(1), None);
        // whoever wrote it lives in the future
        programming.heard(3, later(1), Some(clock + Duration::from_secs(60)));
        programming.applied(0, later(2), clock);
        let count = |name: &str| {
            let text = metrics.encode();
            let line = text.lines().find(|line| line.starts_with(&format!("dataplane_{name}_seconds_count")));
            line.unwrap().rsplit(' ').next().unwrap().to_owned()
        };
        assert_eq!(count("event_to_table"), "0");
        programming.applied(2, later(2), clock);
        assert_eq!((count("event_to_table").as_str(), count("network_programming").as_str()), ("2", "1"));
        programming.applied(9, later(2), clock);
        assert_eq!((count("event_to_table").as_str(), count("network_programming").as_str()), ("3", "2"));
        assert!(metrics.encode().contains("dataplane_network_programming_seconds_sum 3.0"));
    }
}
