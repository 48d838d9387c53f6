//! Kubernetes Events: what an operator must know of an object, said beside it (`kubectl describe`).
//!
//! Owns the counting of repetitions and the rate: the same thing said again is one Event that counts, and no more than
//! a few are written at a time, whatever happens. Whoever announces does not wait and is not told: an Event is a
//! courtesy, and what it says is in the log, the status or the metrics too.

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

/// Announcements that may wait.
const WAITING: usize = 256;
/// What is said again is written again after so long; in between it is counted.
const REPEAT: Duration = Duration::from_secs(300);
/// The API server forgets an Event after an hour: from then on the same thing is a new one.
const FORGOTTEN: Duration = Duration::from_secs(3_000);
/// Events written in one go, and how long one more takes.
const BURST: u32 = 20;
const REFILL: Duration = Duration::from_secs(3);
/// An API server that does not answer keeps nobody for longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest note the API server takes, in bytes; and the longest name of who writes.
const NOTE_MAX: usize = 1_024;
const INSTANCE_MAX: usize = 128;
/// What is left of an object's name in the Event's: that ends in a number, and has a limit of its own.
const SUBJECT_MAX: usize = 200;
/// Where Events about objects without a namespace are.
const NAMESPACE: &str = "default";

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Weight {
    Normal,
    Warning,
}

/// What is to be said.
#[derive(Clone, Debug, PartialEq)]
pub struct Announcement {
    pub about: ObjectReference,
    pub weight: Weight,
    /// A stable word: what happened.
    pub reason: &'static str,
    /// A stable word: what we were doing.
    pub action: &'static str,
    /// A sentence.
    pub note: String,
}

/// Says things. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Announcer(mpsc::Sender<Announcement>);

impl Announcer {
    /// Announces as `controller`, of which this is the one named `instance`. The task ends with the last announcer.
    pub fn start(client: Client, controller: &'static str, instance: &str) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        let writer = Writer {
            events: Api::namespaced(client, NAMESPACE),
            controller,
            instance: cut(instance, INSTANCE_MAX),
            known: HashMap::new(),
            budget: Budget { tokens: BURST, since: Instant::now() },
            complained: false,
        };
        tokio::spawn(writer.run(receiver));
        Self(sender)
    }

    /// Says it, soon and if there is room.
    pub fn announce(&self, announcement: Announcement) {
        if let Err(error) = self.0.try_send(announcement) {
            tracing::debug!(%error, "an Event is not announced");
        }
    }
}

/// A node as the subject of an Event.
pub fn node(name: &str, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(name.to_owned()),
        uid: Some(uid.to_owned()).filter(|uid| !uid.is_empty()),
        ..ObjectReference::default()
    }
}

/// What makes two announcements the same.
type Key = (String, String, &'static str, String);

struct Writer {
    events: Api<Event>,
    controller: &'static str,
    instance: String,
    known: HashMap<Key, Said>,
    budget: Budget,
    /// The API server refuses Events, and the log says so.
    complained: bool,
}

/// An Event that is written.
struct Said {
    name: String,
    count: i32,
    written: Instant,
}

/// How many Events may be written.
struct Budget {
    tokens: u32,
    since: Instant,
}

impl Writer {
    async fn run(mut self, mut announcements: mpsc::Receiver<Announcement>) {
        while let Some(announcement) = announcements.recv().await {
            let written = self.write(&announcement, Instant::now()).await;
            if let Err(error) = &written
                && !self.complained
            {
                tracing::warn!(error = explain(error), "Events cannot be written");
            }
            self.complained = written.is_err();
        }
    }

    async fn write(&mut self, what: &Announcement, now: Instant) -> Result<(), kube::Error> {
        self.known.retain(|_, said| now.duration_since(said.written) < FORGOTTEN);
        let (name, uid) = (what.about.name.clone(), what.about.uid.clone());
        let key = (name.unwrap_or_default(), uid.unwrap_or_default(), what.reason, what.note.clone());
        if let Some(said) = self.known.get_mut(&key) {
            said.count = said.count.saturating_add(1);
            // that it was not once is news too
            let is_news = said.count == 2 || now.duration_since(said.written) >= REPEAT;
            if !is_news || !self.budget.take(now) {
                return Ok(());
            }
            said.written = now;
            let series = EventSeries { count: said.count, last_observed_time: MicroTime(Timestamp::now()) };
            let patch = Patch::Merge(serde_json::json!({ "series": series }));
            return patient(self.events.patch(&said.name, &PatchParams::default(), &patch)).await;
        }
        if !self.budget.take(now) {
            return Ok(());
        }
        let event = self.event(what, &key.0);
        patient(self.events.create(&PostParams::default(), &event)).await?;
        let name = event.metadata.name.unwrap_or_default();
        self.known.insert(key, Said { name, count: 1, written: now });
        Ok(())
    }

    fn event(&self, what: &Announcement, subject: &str) -> Event {
        let now = Timestamp::now();
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{}.{:x}", cut(subject, SUBJECT_MAX), now.as_nanosecond())),
                namespace: Some(NAMESPACE.to_owned()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(now)),
            regarding: Some(what.about.clone()),
            type_: Some(what.weight.name().to_owned()),
            reason: Some(what.reason.to_owned()),
            action: Some(what.action.to_owned()),
            note: Some(cut(&what.note, NOTE_MAX)),
            reporting_controller: Some(format!("dataplane.local/{}", self.controller)),
            reporting_instance: Some(self.instance.clone()),
            ..Event::default()
        }
    }
}

/// As much of a text as there is room for. A name that is cut must not end in a dot.
fn cut(text: &str, longest: usize) -> String {
    match text.get(..text.floor_char_boundary(longest)) {
        Some(start) if start.len() < text.len() => start.trim_end_matches(['.', '-']).to_owned(),
        _ => text.to_owned(),
    }
}

async fn patient<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<(), kube::Error> {
    match timeout(PATIENCE, request).await {
        Ok(answer) => answer.map(drop),
        Err(late) => Err(kube::Error::Service(late.into())),
    }
}

impl Budget {
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

impl Weight {
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
    fn what_is_too_long_is_cut_to_what_the_api_server_takes() {
        assert_eq!(cut("n1", 200), "n1");
        assert_eq!(cut("worker.example", 7), "worker");
        assert_eq!(cut("äöü", 3), "ä");
    }

    #[test]
    fn a_flood_is_a_few_and_then_one_at_a_time() {
        let start = Instant::now();
        let mut budget = Budget { tokens: BURST, since: start };
        let taken = (0..100).filter(|_| budget.take(start)).count();
        assert_eq!(taken, BURST as usize);
        assert!(!budget.take(start + REFILL / 2));
        assert!(budget.take(start + REFILL));
        assert!(!budget.take(start + REFILL));
    }
}
