//! Compares the events of all reflectors with the delivered objects, and passes on only the
//! differences.
//!
//! Of each delivered object only the UID and a digest are kept. An object with equal content but
//! another resourceVersion is no event: heartbeats of nodes end here.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use super::{
    Progress,
    cache::{Cache, Snapshot},
    reflector::WatchEvent,
};
use crate::{
    source::{
        Problem, Problems,
        conflicts::ConflictResolver,
        objects::{Converted, FieldError, Kind},
    },
    state::{Object, ObjectKey, Owner, SourceEvent, Uid},
};

/// How long a change may be missing on disk.
const SAVE_INTERVAL: Duration = Duration::from_secs(5);
/// The namespace whose UID identifies the cluster.
const CLUSTER_NAMESPACE: &str = "kube-system";
/// List round of an object restored from disk and not seen since.
const UNCONFIRMED: u32 = 0;

/// The receiver of events is gone.
struct Closed;

/// Delivers the events of all kinds.
pub(super) struct Deduplicator {
    events: mpsc::Sender<SourceEvent>,
    problems: Problems,
    progress: Progress,
    cache: Cache,
    conflicts: ConflictResolver,
    delivered: HashMap<ObjectKey, Delivered>,
    /// Problems of objects, and the list round in which they were found.
    object_problems: BTreeMap<ObjectKey, (u32, Vec<String>)>,
    /// The last error of each kind's list or watch.
    kind_errors: BTreeMap<Kind, String>,
    /// Number of lists started per kind.
    rounds: BTreeMap<Kind, u32>,
    listed: BTreeSet<Kind>,
    dirty: bool,
}

struct Delivered {
    uid: Uid,
    digest: u64,
    /// The last list round that contained it.
    round: u32,
}

impl Deduplicator {
    pub(super) fn new(
        events: mpsc::Sender<SourceEvent>,
        problems: Problems,
        progress: Progress,
        cache: Cache,
    ) -> Self {
        Self {
            events,
            problems,
            progress,
            cache,
            conflicts: ConflictResolver::default(),
            delivered: HashMap::new(),
            object_problems: BTreeMap::new(),
            kind_errors: BTreeMap::new(),
            rounds: BTreeMap::new(),
            listed: BTreeSet::new(),
            dirty: false,
        }
    }

    /// Delivers the snapshot, then watch events, until either channel closes.
    pub(super) async fn run(&mut self, snapshot: Snapshot, watch_events: &mut mpsc::Receiver<WatchEvent>) {
        let _closed = self.try_run(snapshot, watch_events).await;
    }

    async fn try_run(
        &mut self,
        snapshot: Snapshot,
        watch_events: &mut mpsc::Receiver<WatchEvent>,
    ) -> Result<(), Closed> {
        self.restore(snapshot).await?;
        let mut save = interval(SAVE_INTERVAL);
        save.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = watch_events.recv() => match event {
                    Some(event) => {
                        self.on_event(event).await?;
                        if self.cache.should_flush() {
                            self.save().await;
                        }
                    }
                    None => return Ok(()),
                },
                _ = save.tick() => self.save().await,
            }
            if self.dirty && watch_events.is_empty() {
                self.dirty = false;
                self.publish();
            }
        }
    }

    async fn save(&mut self) {
        let connected = self.progress.behind_since().is_none();
        self.dirty |= self.cache.save(self.delivered.len(), connected).await;
    }

    /// Writes everything that was delivered to disk.
    pub(super) async fn close(&mut self) {
        let connected = self.progress.behind_since().is_none();
        self.cache.close(connected).await;
    }

    async fn restore(&mut self, snapshot: Snapshot) -> Result<(), Closed> {
        if let Some(time) = snapshot.time {
            self.progress.set_snapshot_time(time);
            tracing::info!(
                objects = snapshot.objects.len(),
                "restored cached cluster state; it is used until the API server answers"
            );
        }
        for object in snapshot.objects {
            let digest = digest(&object);
            let delivered = Delivered { uid: object.owner().uid, digest, round: UNCONFIRMED };
            self.delivered.insert(object.key(), delivered);
            // already on disk
            self.deliver(SourceEvent::Upsert(object), false).await?;
        }
        Ok(())
    }

    async fn on_event(&mut self, event: WatchEvent) -> Result<(), Closed> {
        match event {
            WatchEvent::ListStarted(kind) => *self.rounds.entry(kind).or_insert(UNCONFIRMED) += 1,
            WatchEvent::Applied(key, converted) => self.on_applied(key, converted).await?,
            WatchEvent::Deleted(key, owner) => {
                let delivered = self.delivered.get(&key);
                let successor =
                    delivered.is_some_and(|delivered| !owner.uid.is_empty() && delivered.uid != owner.uid);
                if !successor {
                    self.clear_problems(&key);
                    self.remove(key).await?;
                }
            }
            WatchEvent::ListDone { kind, complete } => self.on_list_done(kind, complete).await?,
            WatchEvent::LastError(kind, reason) => {
                self.dirty = true;
                match reason {
                    Some(reason) => self.kind_errors.insert(kind, reason),
                    None => self.kind_errors.remove(&kind),
                };
            }
        }
        Ok(())
    }

    async fn on_applied(
        &mut self,
        key: ObjectKey,
        converted: Result<Converted, FieldError>,
    ) -> Result<(), Closed> {
        let round = self.rounds.get(&kind_of(&key)).copied().unwrap_or_default();
        if let Some(delivered) = self.delivered.get_mut(&key) {
            let unconfirmed = std::mem::replace(&mut delivered.round, round) == UNCONFIRMED;
            if unconfirmed && belongs_to_other_cluster(&key, delivered, &converted) {
                tracing::warn!("cached cluster state belongs to another cluster; discarding it");
                self.remove_unconfirmed().await?;
            }
        }
        match converted {
            Ok(Converted { object, problems }) => {
                let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
                self.set_problems(&key, round, problems);
                match object {
                    Some(object) => self.upsert(key, object, round).await,
                    None => self.remove(key).await,
                }
            }
            // the last valid version stays
            Err(error) => {
                self.set_problems(&key, round, vec![error.to_string()]);
                Ok(())
            }
        }
    }

    async fn upsert(&mut self, key: ObjectKey, object: Object, round: u32) -> Result<(), Closed> {
        let digest = digest(&object);
        let uid = object.owner().uid;
        let before = self.delivered.insert(key, Delivered { uid, digest, round });
        if before.is_some_and(|before| before.digest == digest) {
            return Ok(());
        }
        self.deliver(SourceEvent::Upsert(object), true).await
    }

    async fn remove(&mut self, key: ObjectKey) -> Result<(), Closed> {
        let Some(delivered) = self.delivered.remove(&key) else { return Ok(()) };
        let owner = Owner { uid: delivered.uid };
        self.deliver(SourceEvent::Remove(key, owner), true).await
    }

    /// Removes objects of the kind that the completed list did not contain.
    async fn on_list_done(&mut self, kind: Kind, complete: bool) -> Result<(), Closed> {
        let round = self.rounds.get(&kind).copied().unwrap_or_default();
        if complete {
            self.remove_all(|key, delivered| kind_of(key) == kind && delivered.round != round).await?;
            let before = self.object_problems.len();
            self.object_problems.retain(|key, (found_in, _)| kind_of(key) != kind || *found_in == round);
            self.dirty |= self.object_problems.len() != before;
        }
        let all_listed = self.listed.insert(kind) && self.listed.len() == Kind::ALL.len();
        if all_listed {
            self.deliver(SourceEvent::Synced, false).await?;
        }
        Ok(())
    }

    async fn remove_unconfirmed(&mut self) -> Result<(), Closed> {
        self.remove_all(|_, delivered| delivered.round == UNCONFIRMED).await
    }

    async fn remove_all(&mut self, which: impl Fn(&ObjectKey, &Delivered) -> bool) -> Result<(), Closed> {
        let keys: Vec<_> = self
            .delivered
            .iter()
            .filter(|(key, delivered)| which(key, delivered))
            .map(|(key, _)| key.clone())
            .collect();
        for key in keys {
            self.remove(key).await?;
        }
        Ok(())
    }

    /// Delivers an event unless it conflicts with a delivered object. `persist`: also to the cache.
    async fn deliver(&mut self, event: SourceEvent, persist: bool) -> Result<(), Closed> {
        let waiting = self.conflicts.waiting();
        for event in self.conflicts.apply([event]) {
            if persist {
                self.cache.record(&event);
            }
            self.events.send(event).await.map_err(|_closed| Closed)?;
        }
        self.dirty |= waiting + self.conflicts.waiting() > 0;
        Ok(())
    }

    fn set_problems(&mut self, key: &ObjectKey, round: u32, problems: Vec<String>) {
        if problems.is_empty() {
            return self.clear_problems(key);
        }
        let before = self.object_problems.insert(key.clone(), (round, problems));
        self.dirty |= before
            .is_none_or(|(_, before)| self.object_problems.get(key).is_some_and(|(_, now)| before != *now));
    }

    fn clear_problems(&mut self, key: &ObjectKey) {
        self.dirty |= self.object_problems.remove(key).is_some();
    }

    fn publish(&self) {
        let problem = |subject: String, message: String| Problem { subject, message };
        let objects = self.object_problems.iter().flat_map(|(key, (_, messages))| {
            messages.iter().map(move |message| problem(key.to_string(), message.clone()))
        });
        let waiting_reasons =
            self.conflicts.waiting_reasons().map(|(key, message)| problem(key.to_string(), message));
        // kinds with the same error share one problem
        let kind_errors =
            self.kind_errors.values().map(|reason| problem("API server".to_owned(), reason.clone()));
        let disk = self.cache.last_error().map(|message| problem("cluster state cache".to_owned(), message));
        self.problems.replace(objects.chain(waiting_reasons).chain(kind_errors).chain(disk).collect());
    }
}

/// Digest of an object's content.
fn digest(object: &Object) -> u64 {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    hasher.finish()
}

fn belongs_to_other_cluster(
    key: &ObjectKey,
    delivered: &Delivered,
    converted: &Result<Converted, FieldError>,
) -> bool {
    let Ok(Converted { object: Some(object), .. }) = converted else { return false };
    matches!(key, ObjectKey::Namespace(name) if name == CLUSTER_NAMESPACE)
        && delivered.uid != object.owner().uid
}

const fn kind_of(key: &ObjectKey) -> Kind {
    match key {
        ObjectKey::Node(_) => Kind::Node,
        ObjectKey::Namespace(_) => Kind::Namespace,
        ObjectKey::Service(_) => Kind::Service,
        ObjectKey::EndpointSlice(_) => Kind::EndpointSlice,
        ObjectKey::Pod(_) => Kind::Pod,
        ObjectKey::ServiceCidr(_) => Kind::ServiceCidr,
    }
}

#[cfg(test)]
mod tests;
