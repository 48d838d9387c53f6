//! The state that all connections of a server share.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::json;
use tokio::sync::watch;

use super::{
    faults::Faults,
    rbac::Access,
    resources::Resource,
    store::{Key, Store},
};

/// Settings in which API servers differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behaviour {
    /// Whether `sendInitialEvents` is supported; servers before 1.32 reject it.
    pub streaming_lists: bool,
    /// The interval between bookmarks.
    pub bookmarks: Duration,
    /// Maximum objects in a list page, whatever `limit` says.
    pub page: usize,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { streaming_lists: true, bookmarks: Duration::from_secs(5), page: usize::MAX }
    }
}

/// Objects, users, settings and faults.
#[derive(Debug)]
pub(super) struct State {
    store: Mutex<Store>,
    access: Mutex<Access>,
    behaviour: Mutex<Behaviour>,
    pub(super) faults: Faults,
    /// The current revision; watches wait for its change.
    revision: watch::Sender<u64>,
}

impl State {
    /// Creates a state with the namespaces that every cluster has.
    pub(super) fn new() -> Arc<Self> {
        let mut store = Store::new();
        let resource = Resource::named("v1", "Namespace").expect("namespaces are in the list of kinds");
        for name in ["default", "kube-node-lease", "kube-public", "kube-system"] {
            let object = json!({
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {
                    "name": name,
                    "uid": format!("00000000-0000-4000-8000-{:012x}", name.len()),
                    "creationTimestamp": super::admission::now(),
                    "labels": {"kubernetes.io/metadata.name": name},
                },
                "spec": {"finalizers": ["kubernetes"]},
                "status": {"phase": "Active"},
            });
            store.put(&Key { resource, namespace: String::new(), name: name.to_owned() }, object);
        }
        let revision = watch::channel(store.revision()).0;
        Arc::new(Self {
            store: Mutex::new(store),
            access: Mutex::default(),
            behaviour: Mutex::default(),
            faults: Faults::default(),
            revision,
        })
    }

    pub(super) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn access(&self) -> MutexGuard<'_, Access> {
        self.access.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn behaviour(&self) -> MutexGuard<'_, Behaviour> {
        self.behaviour.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes objects, then wakes the watches.
    pub(super) fn write<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = self.store();
        let result = change(&mut store);
        let revision = store.revision();
        drop(store);
        // a concurrent later write may have published its revision first
        self.revision.send_if_modified(|known| {
            let is_newer = revision > *known;
            *known = revision.max(*known);
            is_newer
        });
        result
    }

    pub(super) fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }
}
