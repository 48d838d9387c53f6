//! How far the source is behind the cluster, and its error counters, for `status` and the metrics.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::watch;

use crate::{cluster::FailoverStats, source::objects::Kind};

/// Shared between the source and its observers. The default is that of a source that is never
/// behind.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    failover_stats: FailoverStats,
    oldest: watch::Sender<Option<SystemTime>>,
    /// Kinds without a working watch, and since when.
    behind: Mutex<BTreeMap<Kind, SystemTime>>,
    relists: AtomicU64,
    watch_errors: AtomicU64,
}

impl Progress {
    /// Progress of a source that has no state yet.
    pub fn new(failover_stats: FailoverStats) -> Self {
        let now = SystemTime::now();
        let behind = Mutex::new(Kind::ALL.into_iter().map(|kind| (kind, now)).collect());
        let oldest = watch::Sender::new(Some(now));
        Self(Arc::new(Inner { failover_stats, oldest, behind, ..Inner::default() }))
    }

    /// Receives every change of [`Self::behind_since`].
    pub fn subscribe(&self) -> watch::Receiver<Option<SystemTime>> {
        self.0.oldest.subscribe()
    }

    /// When the state was last known to match the cluster; `None`: it matches now.
    pub fn behind_since(&self) -> Option<SystemTime> {
        self.behind().values().min().copied()
    }

    /// Number of repeated lists.
    pub fn relists(&self) -> u64 {
        self.0.relists.load(Ordering::Relaxed)
    }

    /// Number of failed requests and broken watches.
    pub fn watch_errors(&self) -> u64 {
        self.0.watch_errors.load(Ordering::Relaxed)
    }

    /// Number of switches to another API server.
    pub fn failovers(&self) -> u64 {
        self.0.failover_stats.failovers()
    }

    /// The state was restored from a snapshot of this time.
    pub(super) fn set_snapshot_time(&self, time: SystemTime) {
        self.change(|behind| behind.values_mut().for_each(|since| *since = time.min(*since)));
    }

    pub(super) fn on_watching(&self, kind: Kind) {
        self.change(|behind| {
            behind.remove(&kind);
        });
    }

    pub(super) fn on_watch_lost(&self, kind: Kind) {
        self.change(|behind| {
            behind.entry(kind).or_insert_with(SystemTime::now);
        });
        self.0.watch_errors.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn on_relist(&self, kind: Kind) {
        self.change(|behind| {
            behind.entry(kind).or_insert_with(SystemTime::now);
        });
        self.0.relists.fetch_add(1, Ordering::Relaxed);
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<Kind, SystemTime>)) {
        let mut behind = self.behind();
        change(&mut behind);
        let now = behind.values().min().copied();
        self.0.oldest.send_if_modified(|oldest| std::mem::replace(oldest, now) != now);
    }

    fn behind(&self) -> MutexGuard<'_, BTreeMap<Kind, SystemTime>> {
        self.0.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn state_is_as_old_as_its_oldest_kind() {
        let progress = Progress::new(FailoverStats::default());
        let cached = SystemTime::now() - Duration::from_secs(60);
        progress.set_snapshot_time(cached);
        assert_eq!(progress.behind_since(), Some(cached));
        for kind in Kind::ALL {
            progress.on_watching(kind);
        }
        assert_eq!(progress.behind_since(), None);
        progress.on_watch_lost(Kind::Pod);
        let since = progress.behind_since().unwrap();
        assert!(since > cached);
        progress.on_watch_lost(Kind::Pod);
        assert_eq!((progress.behind_since(), progress.watch_errors()), (Some(since), 2));
    }
}
