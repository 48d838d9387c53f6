//! What all reflectors heard, against what was delivered: the difference goes on, and to the disk.
//!
//! Of what was delivered only its identity and a digest are kept. An object that is as it was, whatever its
//! resourceVersion, is no event: heartbeats of nodes cost nothing behind here.

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
    cache::{Cache, Known},
    reflector::WatchEvent,
};
use crate::{
    source::{
        Problem, Problems,
        conflicts::Conflicts,
        objects::{Converted, FieldError, Kind},
    },
    state::{Object, ObjectKey, Owner, SourceEvent, Uid},
};

/// How long a change may be missing on disk.
const SAVE: Duration = Duration::from_secs(5);
/// Its UID is the cluster's.
const CLUSTER: &str = "kube-system";
/// The round of what was delivered from disk, and not heard since.
const UNCONFIRMED: u32 = 0;

/// Nobody listens any more.
struct Closed;

/// The one place that delivers.
pub(super) struct Deduplicator {
    events: mpsc::Sender<SourceEvent>,
    problems: Problems,
    progress: Progress,
    cache: Cache,
    conflicts: Conflicts,
    delivered: HashMap<ObjectKey, Delivered>,
    /// What is wrong with objects, and in which round that was said.
    wrong: BTreeMap<ObjectKey, (u32, Vec<String>)>,
    /// What is wrong with whole kinds.
    troubles: BTreeMap<Kind, String>,
    /// How often everything of a kind was asked for.
    rounds: BTreeMap<Kind, u32>,
    listed: BTreeSet<Kind>,
    news: bool,
}

struct Delivered {
    uid: Uid,
    digest: u64,
    /// When it was last heard of by a list.
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
            conflicts: Conflicts::default(),
            delivered: HashMap::new(),
            wrong: BTreeMap::new(),
            troubles: BTreeMap::new(),
            rounds: BTreeMap::new(),
            listed: BTreeSet::new(),
            news: false,
        }
    }

    /// Delivers what was known, then what is heard, until nobody listens.
    pub(super) async fn run(&mut self, known: Known, hearing: &mut mpsc::Receiver<WatchEvent>) {
        let _closed = self.try_run(known, hearing).await;
    }

    async fn try_run(
        &mut self,
        known: Known,
        hearing: &mut mpsc::Receiver<WatchEvent>,
    ) -> Result<(), Closed> {
        self.restore(known).await?;
        let mut save = interval(SAVE);
        save.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                heard = hearing.recv() => match heard {
                    Some(heard) => {
                        self.hear(heard).await?;
                        if self.cache.has_much() {
                            self.save().await;
                        }
                    }
                    None => return Ok(()),
                },
                _ = save.tick() => self.save().await,
            }
            if self.news && hearing.is_empty() {
                self.news = false;
                self.publish();
            }
        }
    }

    async fn save(&mut self) {
        let in_contact = self.progress.behind_since().is_none();
        self.news |= self.cache.save(self.delivered.len(), in_contact).await;
    }

    /// Everything that was delivered is on disk when this returns.
    pub(super) async fn close(&mut self) {
        let in_contact = self.progress.behind_since().is_none();
        self.cache.close(in_contact).await;
    }

    async fn restore(&mut self, known: Known) -> Result<(), Closed> {
        if let Some(time) = known.time {
            self.progress.starts_from(time);
            tracing::info!(objects = known.objects.len(), "starting from what the cluster last was");
        }
        for object in known.objects {
            let digest = digest(&object);
            let delivered = Delivered { uid: object.owner().uid, digest, round: UNCONFIRMED };
            self.delivered.insert(object.key(), delivered);
            // it is on disk
            self.pass(SourceEvent::Upsert(object), false).await?;
        }
        Ok(())
    }

    async fn hear(&mut self, heard: WatchEvent) -> Result<(), Closed> {
        match heard {
            WatchEvent::Listing(kind) => *self.rounds.entry(kind).or_insert(UNCONFIRMED) += 1,
            WatchEvent::Is(key, converted) => self.is(key, converted).await?,
            WatchEvent::Gone(key, owner) => {
                let held = self.delivered.get(&key);
                let successor = held.is_some_and(|held| !owner.uid.is_empty() && held.uid != owner.uid);
                if !successor {
                    self.clear(&key);
                    self.remove(key).await?;
                }
            }
            WatchEvent::Listed { kind, complete } => self.listed(kind, complete).await?,
            WatchEvent::Trouble(kind, reason) => {
                self.news = true;
                match reason {
                    Some(reason) => self.troubles.insert(kind, reason),
                    None => self.troubles.remove(&kind),
                };
            }
        }
        Ok(())
    }

    async fn is(&mut self, key: ObjectKey, converted: Result<Converted, FieldError>) -> Result<(), Closed> {
        let round = self.rounds.get(&kind_of(&key)).copied().unwrap_or_default();
        if let Some(held) = self.delivered.get_mut(&key) {
            let unconfirmed = std::mem::replace(&mut held.round, round) == UNCONFIRMED;
            if unconfirmed && is_of_another_cluster(&key, held, &converted) {
                tracing::warn!("what was kept on disk is of another cluster: forgotten");
                self.forget_unconfirmed().await?;
            }
        }
        match converted {
            Ok(Converted { object, problems }) => {
                let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
                self.complain(&key, round, problems);
                match object {
                    Some(object) => self.upsert(key, object, round).await,
                    None => self.remove(key).await,
                }
            }
            // its last good state stays
            Err(error) => {
                self.complain(&key, round, vec![error.to_string()]);
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
        self.pass(SourceEvent::Upsert(object), true).await
    }

    async fn remove(&mut self, key: ObjectKey) -> Result<(), Closed> {
        let Some(held) = self.delivered.remove(&key) else { return Ok(()) };
        let owner = Owner { uid: held.uid };
        self.pass(SourceEvent::Remove(key, owner), true).await
    }

    /// What was there before and was not heard of now is gone.
    async fn listed(&mut self, kind: Kind, complete: bool) -> Result<(), Closed> {
        let round = self.rounds.get(&kind).copied().unwrap_or_default();
        if complete {
            self.remove_all(|key, held| kind_of(key) == kind && held.round != round).await?;
            let before = self.wrong.len();
            self.wrong.retain(|key, (said, _)| kind_of(key) != kind || *said == round);
            self.news |= self.wrong.len() != before;
        }
        let last = self.listed.insert(kind) && self.listed.len() == Kind::ALL.len();
        if last {
            self.pass(SourceEvent::Synced, false).await?;
        }
        Ok(())
    }

    async fn forget_unconfirmed(&mut self) -> Result<(), Closed> {
        self.remove_all(|_, held| held.round == UNCONFIRMED).await
    }

    async fn remove_all(&mut self, which: impl Fn(&ObjectKey, &Delivered) -> bool) -> Result<(), Closed> {
        let gone: Vec<_> = self
            .delivered
            .iter()
            .filter(|(key, held)| which(key, held))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.remove(key).await?;
        }
        Ok(())
    }

    /// Lets through what does not exclude what was let through before.
    async fn pass(&mut self, event: SourceEvent, keep: bool) -> Result<(), Closed> {
        let waiting = self.conflicts.waiting();
        for event in self.conflicts.apply([event]) {
            if keep {
                self.cache.note(&event);
            }
            self.events.send(event).await.map_err(|_closed| Closed)?;
        }
        self.news |= waiting + self.conflicts.waiting() > 0;
        Ok(())
    }

    fn complain(&mut self, key: &ObjectKey, round: u32, problems: Vec<String>) {
        if problems.is_empty() {
            return self.clear(key);
        }
        let before = self.wrong.insert(key.clone(), (round, problems));
        self.news |=
            before.is_none_or(|(_, before)| self.wrong.get(key).is_some_and(|(_, now)| before != *now));
    }

    fn clear(&mut self, key: &ObjectKey) {
        self.news |= self.wrong.remove(key).is_some();
    }

    fn publish(&self) {
        let problem = |subject: String, message: String| Problem { subject, message };
        let objects = self.wrong.iter().flat_map(|(key, (_, messages))| {
            messages.iter().map(move |message| problem(key.to_string(), message.clone()))
        });
        let refused = self.conflicts.refused().map(|(key, message)| problem(key.to_string(), message));
        // kinds that suffer from the same thing say the same
        let troubles = self.troubles.values().map(|reason| problem("API server".to_owned(), reason.clone()));
        let disk = self.cache.trouble().map(|message| problem("last state".to_owned(), message));
        self.problems.replace(objects.chain(refused).chain(troubles).chain(disk).collect());
    }
}

/// Of what an object says.
fn digest(object: &Object) -> u64 {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    hasher.finish()
}

fn is_of_another_cluster(
    key: &ObjectKey,
    held: &Delivered,
    converted: &Result<Converted, FieldError>,
) -> bool {
    let Ok(Converted { object: Some(object), .. }) = converted else { return false };
    matches!(key, ObjectKey::Namespace(name) if name == CLUSTER) && held.uid != object.owner().uid
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
