//! How far the source is behind the cluster, and what it went through, for `status` and the metrics.

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

/// Shared between the source and those who show it. By default: of a source that is never behind.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    failover_stats: FailoverStats,
    oldest: watch::Sender<Option<SystemTime>>,
    /// Kinds that are not being watched, and since when.
    behind: Mutex<BTreeMap<Kind, SystemTime>>,
    relists: AtomicU64,
    watch_errors: AtomicU64,
}

impl Progress {
    /// Of a source that has heard nothing yet, whose client has this `contact`.
    pub fn new(failover_stats: FailoverStats) -> Self {
        let now = SystemTime::now();
        let behind = Mutex::new(Kind::ALL.into_iter().map(|kind| (kind, now)).collect());
        let oldest = watch::Sender::new(Some(now));
        Self(Arc::new(Inner { failover_stats, oldest, behind, ..Inner::default() }))
    }

    /// Follows [`Self::behind_since`].
    pub fn subscribe(&self) -> watch::Receiver<Option<SystemTime>> {
        self.0.oldest.subscribe()
    }

    /// When the state was last known to be that of the cluster; `None`: it is now.
    pub fn behind_since(&self) -> Option<SystemTime> {
        self.behind().values().min().copied()
    }

    /// How often everything of a kind was asked for again.
    pub fn relists(&self) -> u64 {
        self.0.relists.load(Ordering::Relaxed)
    }

    /// Requests that failed, watches that broke off.
    pub fn watch_errors(&self) -> u64 {
        self.0.watch_errors.load(Ordering::Relaxed)
    }

    /// How often another API server was taken.
    pub fn failovers(&self) -> u64 {
        self.0.failover_stats.failovers()
    }

    /// What is known is as old as this.
    pub(super) fn starts_from(&self, time: SystemTime) {
        self.change(|behind| behind.values_mut().for_each(|since| *since = time.min(*since)));
    }

    pub(super) fn watching(&self, kind: Kind) {
        self.change(|behind| {
            behind.remove(&kind);
        });
    }

    pub(super) fn lost(&self, kind: Kind) {
        self.change(|behind| {
            behind.entry(kind).or_insert_with(SystemTime::now);
        });
        self.0.watch_errors.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn relisting(&self, kind: Kind) {
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
    fn the_state_is_as_old_as_its_oldest_part() {
        let progress = Progress::new(FailoverStats::default());
        let cached = SystemTime::now() - Duration::from_secs(60);
        progress.starts_from(cached);
        assert_eq!(progress.behind_since(), Some(cached));
        for kind in Kind::ALL {
            progress.watching(kind);
        }
        assert_eq!(progress.behind_since(), None);
        progress.lost(Kind::Pod);
        let since = progress.behind_since().unwrap();
        assert!(since > cached);
        progress.lost(Kind::Pod);
        assert_eq!((progress.behind_since(), progress.watch_errors()), (Some(since), 2));
    }
}
