//! Writes Kubernetes Events (`kubectl describe`).
//!
//! A repeated Event becomes a series with a count, and the rate of writes is limited. Writing is
//! best effort: callers do not wait and get no error. Everything in an Event is also in the log,
//! the status or the metrics.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{
        core::v1::ObjectReference,
        events::v1::{Event, EventSeries},
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tokio::{sync::mpsc, time::timeout};

use crate::cluster::explain;

/// Capacity of the queue.
const QUEUE: usize = 256;
/// A repeated Event is written at most this often; in between it is only counted.
const SERIES_INTERVAL: Duration = Duration::from_secs(300);
/// Lifetime of a series: less than the hour that the API server keeps Events.
const SERIES_LIFETIME: Duration = Duration::from_secs(3_000);
/// Token bucket: its size, and the time for one more token.
const BURST: u32 = 20;
const REFILL: Duration = Duration::from_secs(3);
/// Timeout of a request to the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest `note` and `reportingInstance` that the API server accepts, in bytes.
const NOTE_MAX: usize = 1_024;
const INSTANCE_MAX: usize = 128;
/// Longest prefix of an Event's name; a number follows it.
const SUBJECT_MAX: usize = 200;
/// Namespace of Events about objects that have no namespace.
const NAMESPACE: &str = "default";

/// Type of an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    Normal,
    Warning,
}

/// An Event to write.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    pub regarding: ObjectReference,
    pub event_type: EventType,
    /// Why, in UpperCamelCase; stable.
    pub reason: &'static str,
    /// The action that succeeded or failed, in UpperCamelCase; stable.
    pub action: &'static str,
    /// A sentence.
    pub note: String,
}

/// Queues Events for writing. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EventRecorder(mpsc::Sender<NewEvent>);

impl EventRecorder {
    /// Starts a task that writes Events of `controller`. The task ends when the last clone is
    /// dropped.
    pub fn start(client: Client, controller: &'static str, instance: &str) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let writer = Writer {
            events: Api::namespaced(client, NAMESPACE),
            controller,
            instance: truncate(instance, INSTANCE_MAX),
            series: HashMap::new(),
            bucket: TokenBucket { tokens: BURST, since: Instant::now() },
            failing: false,
        };
        tokio::spawn(writer.run(receiver));
        Self(sender)
    }

    /// Queues an Event; drops it if the queue is full.
    pub fn record(&self, event: NewEvent) {
        if let Err(error) = self.0.try_send(event) {
            tracing::debug!(%error, "Event dropped: the queue is full");
        }
    }
}

/// Reference to a Node.
pub fn node(name: &str, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(name.to_owned()),
        uid: Some(uid.to_owned()).filter(|uid| !uid.is_empty()),
        ..ObjectReference::default()
    }
}

/// Events with the same key form a series: name and UID of the object, reason, note.
type SeriesKey = (String, String, &'static str, String);

struct Writer {
    events: Api<Event>,
    controller: &'static str,
    instance: String,
    series: HashMap<SeriesKey, Series>,
    bucket: TokenBucket,
    /// The last write failed, and was logged.
    failing: bool,
}

/// An Event that was written, and its repetitions.
struct Series {
    name: String,
    count: i32,
    written: Instant,
}

/// Limits the rate of writes.
struct TokenBucket {
    tokens: u32,
    since: Instant,
}

impl Writer {
    async fn run(mut self, mut events: mpsc::Receiver<NewEvent>) {
        while let Some(new) = events.recv().await {
            let written = self.write(&new, Instant::now()).await;
            if let Err(error) = &written
                && !self.failing
            {
                tracing::warn!(error = explain(error), "cannot write Kubernetes Events");
            }
            self.failing = written.is_err();
        }
    }

    async fn write(&mut self, new: &NewEvent, now: Instant) -> Result<(), kube::Error> {
        self.series.retain(|_, series| now.duration_since(series.written) < SERIES_LIFETIME);
        let NewEvent { regarding, reason, note, .. } = new;
        let (name, uid) = (regarding.name.clone(), regarding.uid.clone());
        let key = (name.unwrap_or_default(), uid.unwrap_or_default(), *reason, note.clone());
        if let Some(series) = self.series.get_mut(&key) {
            series.count = series.count.saturating_add(1);
            // the second occurrence is written at once: it turns the Event into a series
            let is_due = series.count == 2 || now.duration_since(series.written) >= SERIES_INTERVAL;
            if !is_due || !self.bucket.take(now) {
                return Ok(());
            }
            series.written = now;
            let name = series.name.clone();
            let series = EventSeries { count: series.count, last_observed_time: MicroTime(Timestamp::now()) };
            let patch = Patch::Merge(serde_json::json!({ "series": series }));
            return with_timeout(self.events.patch(&name, &PatchParams::default(), &patch)).await;
        }
        if !self.bucket.take(now) {
            return Ok(());
        }
        let event = self.event(new, &key.0);
        with_timeout(self.events.create(&PostParams::default(), &event)).await?;
        let name = event.metadata.name.unwrap_or_default();
        self.series.insert(key, Series { name, count: 1, written: now });
        Ok(())
    }

    fn event(&self, new: &NewEvent, subject: &str) -> Event {
        let now = Timestamp::now();
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{}.{:x}", truncate(subject, SUBJECT_MAX), now.as_nanosecond())),
                namespace: Some(NAMESPACE.to_owned()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(now)),
            regarding: Some(new.regarding.clone()),
            type_: Some(new.event_type.name().to_owned()),
            reason: Some(new.reason.to_owned()),
            action: Some(new.action.to_owned()),
            note: Some(truncate(&new.note, NOTE_MAX)),
            reporting_controller: Some(format!("dataplane.local/{}", self.controller)),
            reporting_instance: Some(self.instance.clone()),
            ..Event::default()
        }
    }
}

/// At most `max` bytes of a text. A truncated name must not end in a dot.
fn truncate(text: &str, max: usize) -> String {
    match text.get(..text.floor_char_boundary(max)) {
        Some(start) if start.len() < text.len() => start.trim_end_matches(['.', '-']).to_owned(),
        _ => text.to_owned(),
    }
}

async fn with_timeout<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<(), kube::Error> {
    match timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => answer.map(drop),
        Err(elapsed) => Err(kube::Error::Service(elapsed.into())),
    }
}

impl TokenBucket {
    fn take(&mut self, now: Instant) -> bool {
        let refills =
            (now.duration_since(self.since).as_millis() / REFILL.as_millis()).try_into().unwrap_or(u32::MAX);
        self.since += REFILL.saturating_mul(refills);
        self.tokens = self.tokens.saturating_add(refills).min(BURST);
        let left = self.tokens.checked_sub(1);
        self.tokens = left.unwrap_or_default();
        left.is_some()
    }
}

impl EventType {
    const fn name(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_truncated_at_character_boundaries() {
        assert_eq!(truncate("n1", 200), "n1");
        assert_eq!(truncate("worker.example", 7), "worker");
        assert_eq!(truncate("äöü", 3), "ä");
    }

    #[test]
    fn writes_are_limited_to_a_burst_and_then_one_per_interval() {
        let start = Instant::now();
        let mut bucket = TokenBucket { tokens: BURST, since: start };
        let taken = (0..100).filter(|_| bucket.take(start)).count();
        assert_eq!(taken, BURST as usize);
        assert!(!bucket.take(start + REFILL / 2));
        assert!(bucket.take(start + REFILL));
        assert!(!bucket.take(start + REFILL));
    }
}
