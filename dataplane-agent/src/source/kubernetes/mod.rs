//! Source `kubernetes`: the API server, watched.
//!
//! One task per kind follows the server ([`reflector`], by [`request`]s); what they hear is judged and compared with
//! what was delivered in one place ([`deduplicator`]), which also keeps it on disk ([`cache`]), so that an agent that starts
//! without an API server forwards by what the cluster last was. An object that cannot be used spoils only itself; what
//! the server cannot tell stays as it was.

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

/// What reflectors have heard and nobody has taken: bounds the memory of a list that arrives faster than it is used.
const HEARD: usize = 64;

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
    /// A source of what `client` says, for the node of this name. What it last said is kept below `state_dir`.
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

    /// Sends what was last known, then what the server says, then every change, until `shutdown`, or until nobody
    /// listens.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let (cache, known) = Cache::open(&self.cache, &self.node);
        let (heard, mut hearing) = mpsc::channel(HEARD);
        let mut deduplicator = Deduplicator::new(self.events, self.problems, self.progress.clone(), cache);
        let mut reflectors = JoinSet::new();
        for kind in Kind::ALL {
            let reflector =
                Reflector::new(kind, self.client.clone(), &self.node, heard.clone(), self.progress.clone());
            reflectors.spawn(reflector.run());
        }
        drop(heard);
        tokio::select! {
            () = shutdown => {}
            () = deduplicator.run(known, &mut hearing) => {}
        }
        reflectors.shutdown().await;
        deduplicator.close().await;
    }
}
