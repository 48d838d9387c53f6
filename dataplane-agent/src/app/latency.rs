//! Programming latency: the time from an object's change until the tables hold it.
//!
//! Two histograms: from the arrival of the watch event, and from the change in the cluster, which
//! the control plane writes into EndpointSlices
//! (`endpoints.kubernetes.io/last-change-trigger-time`). The second is kube-proxy's network
//! programming latency; it depends on the clocks of both machines. The initial list counts for
//! neither.

use std::{
    collections::VecDeque,
    time::{Instant, SystemTime},
};

use crate::{
    metrics::LatencyHistograms,
    state::{Object, SourceEvent},
};

/// Events measured at a time; bounds the memory if a revision is never applied.
const MAX_PENDING: usize = 16_384;

/// Measures the latency of events that the tables do not hold yet.
#[derive(Debug)]
pub(super) struct ProgrammingLatency {
    histograms: LatencyHistograms,
    pending: VecDeque<PendingEvent>,
}

#[derive(Debug)]
struct PendingEvent {
    /// Revision of the state after the event.
    revision: u64,
    received: Instant,
    /// `last-change-trigger-time` of an EndpointSlice.
    trigger: Option<SystemTime>,
}

impl ProgrammingLatency {
    pub(super) fn new(histograms: LatencyHistograms) -> Self {
        Self { histograms, pending: VecDeque::new() }
    }

    /// Time of the change in the cluster, if the object has it.
    pub(super) fn trigger(event: &SourceEvent) -> Option<SystemTime> {
        match event {
            SourceEvent::Upsert(Object::EndpointSlice(slice)) => slice.trigger_time,
            _ => None,
        }
    }

    /// An event received at `received` led to this revision of the state.
    pub(super) fn on_event(&mut self, revision: u64, received: Instant, trigger: Option<SystemTime>) {
        if self.pending.len() < MAX_PENDING {
            self.pending.push_back(PendingEvent { revision, received, trigger });
        }
    }

    /// The tables hold every change up to this revision.
    pub(super) fn on_applied(&mut self, revision: u64, now: Instant, clock: SystemTime) {
        while let Some(event) = self.pending.pop_front_if(|event| event.revision <= revision) {
            self.histograms.from_event.observe(now.saturating_duration_since(event.received).as_secs_f64());
            if let Some(trigger) = event.trigger {
                // a trigger in the future: the other machine's clock is ahead
                let elapsed = clock.duration_since(trigger).unwrap_or_default();
                self.histograms.from_trigger.observe(elapsed.as_secs_f64());
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
    fn latency_is_observed_when_the_revision_is_applied() {
        let metrics = Metrics::new(watch::channel(Status::starting("n")).1);
        let mut latency = ProgrammingLatency::new(metrics.latency());
        let (start, clock) = (Instant::now(), SystemTime::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        latency.on_event(1, start, Some(clock - Duration::from_secs(3)));
        latency.on_event(2, later(1), None);
        // a trigger time in the future
        latency.on_event(3, later(1), Some(clock + Duration::from_secs(60)));
        latency.on_applied(0, later(2), clock);
        let count = |name: &str| {
            let text = metrics.encode();
            let line = text.lines().find(|line| line.starts_with(&format!("dataplane_{name}_seconds_count")));
            line.unwrap().rsplit(' ').next().unwrap().to_owned()
        };
        assert_eq!(count("event_apply_duration"), "0");
        latency.on_applied(2, later(2), clock);
        assert_eq!(
            (count("event_apply_duration").as_str(), count("network_programming_duration").as_str()),
            ("2", "1")
        );
        latency.on_applied(9, later(2), clock);
        assert_eq!(
            (count("event_apply_duration").as_str(), count("network_programming_duration").as_str()),
            ("3", "2")
        );
        assert!(metrics.encode().contains("dataplane_network_programming_duration_seconds_sum 3.0"));
    }
}
