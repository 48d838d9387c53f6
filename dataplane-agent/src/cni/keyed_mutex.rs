//! A mutex per container: one request at a time for a container, any number for different
//! containers.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Mutexes by container ID. Only containers with a request in progress have one.
#[derive(Debug, Default)]
pub(super) struct KeyedMutex {
    mutexes: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
}

/// Holds the mutex of a container until it is dropped.
#[derive(Debug)]
pub(super) struct KeyedGuard<'a> {
    owner: &'a KeyedMutex,
    container_id: String,
    _guard: OwnedMutexGuard<()>,
}

impl KeyedMutex {
    /// Waits until no other request holds the container.
    pub(super) async fn lock(&self, container_id: &str) -> KeyedGuard<'_> {
        let mutex = Arc::clone(self.mutexes().entry(container_id.to_owned()).or_default());
        KeyedGuard { owner: self, container_id: container_id.to_owned(), _guard: mutex.lock_owned().await }
    }

    /// Locks the container if no request holds it or waits for it.
    pub(super) fn try_lock(&self, container_id: &str) -> Option<KeyedGuard<'_>> {
        let mut mutexes = self.mutexes();
        let Entry::Vacant(vacant) = mutexes.entry(container_id.to_owned()) else { return None };
        let guard = Arc::clone(vacant.insert(Arc::default())).try_lock_owned().ok()?;
        Some(KeyedGuard { owner: self, container_id: container_id.to_owned(), _guard: guard })
    }

    fn mutexes(&self) -> MutexGuard<'_, HashMap<String, Arc<AsyncMutex<()>>>> {
        self.mutexes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for KeyedGuard<'_> {
    fn drop(&mut self) {
        let mut mutexes = self.owner.mutexes();
        // two references, the map's and this guard's, mean that no request waits; a new one creates
        // a new mutex
        if mutexes.get(&self.container_id).is_some_and(|mutex| Arc::strong_count(mutex) <= 2) {
            mutexes.remove(&self.container_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn requests_for_one_container_are_serialized_and_for_others_are_not() {
        let locks = KeyedMutex::default();
        let first = locks.lock("a").await;
        let mut second = Box::pin(locks.lock("a"));
        assert!((&mut second).now_or_never().is_none());
        drop(locks.lock("b").now_or_never().unwrap());
        assert!(locks.try_lock("a").is_none());
        drop(locks.try_lock("b").unwrap());
        drop(first);
        let second = second.now_or_never().unwrap();
        assert!(locks.lock("a").now_or_never().is_none());
        drop(second);
        assert!(locks.mutexes().is_empty(), "a container without requests has no mutex");
    }
}
