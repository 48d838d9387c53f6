//! Source `kubernetes`: lists and watches the API server.
//!
//! One [`reflector`] task per kind lists and watches, by [`request`]s. The [`deduplicator`]
//! compares their events with the delivered objects and keeps the state on disk ([`cache`]), so
//! that an agent that starts without an API server uses the last known state. An invalid object
//! affects only itself; state that the server cannot confirm stays.

mod backoff;
mod cache;
mod deduplicator;
mod progress;
mod reflector;
mod request;

use std::{
    future::Future,
    path::{Path, PathBuf},
};

use tokio::{sync::mpsc, task::JoinSet};

pub use cache::files;
pub use progress::Progress;

use self::{cache::Cache, deduplicator::Deduplicator, reflector::Reflector};
use super::{Problems, objects::Kind};
use crate::state::SourceEvent;

/// Capacity of the channel from the reflectors: bounds the memory of a list that arrives faster
/// than it is processed.
const WATCH_EVENTS: usize = 64;

/// The source.
pub struct KubernetesSource {
    client: kube::Client,
    node: String,
    cache: PathBuf,
    events: mpsc::Sender<SourceEvent>,
    problems: Problems,
    progress: Progress,
}

impl KubernetesSource {
    /// Creates the source for the node of this name. The cache is kept below `state_dir`.
    pub fn new(
        client: kube::Client,
        node: &str,
        state_dir: &Path,
        events: mpsc::Sender<SourceEvent>,
        problems: Problems,
        progress: Progress,
    ) -> Self {
        let cache = state_dir.join(cache::FILE);
        Self { client, node: node.to_owned(), cache, events, problems, progress }
    }

    /// Sends the cached state, then the server's state, then every change, until `shutdown` or
    /// until the receiver is gone.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let (cache, snapshot) = Cache::open(&self.cache, &self.node);
        let (sender, mut watch_events) = mpsc::channel(WATCH_EVENTS);
        let mut deduplicator = Deduplicator::new(self.events, self.problems, self.progress.clone(), cache);
        let mut reflectors = JoinSet::new();
        for kind in Kind::ALL {
            let reflector =
                Reflector::new(kind, self.client.clone(), &self.node, sender.clone(), self.progress.clone());
            reflectors.spawn(reflector.run());
        }
        drop(sender);
        tokio::select! {
            () = shutdown => {}
            () = deduplicator.run(snapshot, &mut watch_events) => {}
        }
        reflectors.shutdown().await;
        deduplicator.close().await;
    }
}
