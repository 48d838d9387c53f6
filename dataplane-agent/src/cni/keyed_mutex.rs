//! One request at a time for a container, any number for different ones.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Who is at work on what.
#[derive(Debug, Default)]
pub(super) struct KeyedMutex {
    queues: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
}

/// The right to work on a container. Dropping it lets the next one in.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    turns: &'a KeyedMutex,
    container_id: String,
    _guard: OwnedMutexGuard<()>,
}

impl KeyedMutex {
    /// Waits until nobody else works on the container.
    pub(super) async fn take(&self, container_id: &str) -> Turn<'_> {
        let queue = Arc::clone(self.lock().entry(container_id.to_owned()).or_default());
        Turn { turns: self, container_id: container_id.to_owned(), _guard: queue.lock_owned().await }
    }

    /// The turn, if nobody works on the container nor waits to.
    pub(super) fn try_take(&self, container_id: &str) -> Option<Turn<'_>> {
        let mut queues = self.lock();
        // only containers somebody works on have a queue
        let Entry::Vacant(vacant) = queues.entry(container_id.to_owned()) else { return None };
        let guard = Arc::clone(vacant.insert(Arc::default())).try_lock_owned().ok()?;
        Some(Turn { turns: self, container_id: container_id.to_owned(), _guard: guard })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<AsyncMutex<()>>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut queues = self.turns.lock();
        // the map's and ours: nobody waits, and who comes now makes a new queue
        if queues.get(&self.container_id).is_some_and(|queue| Arc::strong_count(queue) <= 2) {
            queues.remove(&self.container_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn the_same_container_waits_and_another_does_not() {
        let turns = KeyedMutex::default();
        let first = turns.take("a").await;
        let mut second = Box::pin(turns.take("a"));
        assert!((&mut second).now_or_never().is_none());
        drop(turns.take("b").now_or_never().unwrap());
        assert!(turns.try_take("a").is_none());
        drop(turns.try_take("b").unwrap());
        drop(first);
        let second = second.now_or_never().unwrap();
        assert!(turns.take("a").now_or_never().is_none());
        drop(second);
        assert!(turns.lock().is_empty(), "nothing is kept of containers nobody works on");
    }
}
