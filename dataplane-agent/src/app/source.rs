//! Starts the configured source of cluster objects.

use std::time::Duration;

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::AppError;
use crate::{
    cluster::{self, Client},
    config::{Config, Source},
    source::{KubernetesSource, ManifestError, ManifestSource, Problems, Progress},
    state::SourceEvent,
};

/// Time for a stopped source to write its cache.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// A running source.
pub(super) struct SourceHandle {
    task: JoinHandle<Result<(), ManifestError>>,
    stop: oneshot::Sender<()>,
    pub(super) progress: Progress,
    /// Client of the API server, shared with other tasks.
    pub(super) client: Option<Client>,
}

impl SourceHandle {
    /// Starts the source that the configuration names.
    pub(super) async fn start(
        config: &Config,
        events: mpsc::Sender<SourceEvent>,
        problems: Problems,
    ) -> Result<Self, AppError> {
        let (stop, stopped) = oneshot::channel();
        let stopped = async {
            // the sender was used or dropped
            let _either = stopped.await;
        };
        let (task, progress, client) = match config.source {
            Source::Manifests => {
                let source = ManifestSource::new(&config.manifests, events, problems)?;
                let source = source.on_node(&config.node_name);
                (tokio::spawn(source.run(stopped)), Progress::default(), None)
            }
            Source::Kubernetes => {
                let access = config.access();
                let client = cluster::connect(&access).await?;
                let progress = Progress::new(access.failover_stats.clone());
                let (node, state) = (&config.node_name, &config.state_dir);
                let source =
                    KubernetesSource::new(client.clone(), node, state, events, problems, progress.clone());
                let task = tokio::spawn(async move {
                    source.run(stopped).await;
                    Ok(())
                });
                (task, progress, Some(client))
            }
        };
        Ok(Self { task, stop, progress, client })
    }

    /// Waits until the source ends, which is an error while the agent runs.
    pub(super) async fn ended(&mut self) -> Result<(), AppError> {
        Ok((&mut self.task).await.map_err(AppError::Panicked)??)
    }

    /// Stops the source and waits until its cache is on disk.
    pub(super) async fn stop(self) {
        // fails if it has ended already
        let _ended = self.stop.send(());
        if tokio::time::timeout(STOP_TIMEOUT, self.task).await.is_err() {
            tracing::warn!(
                "the source did not stop within {STOP_TIMEOUT:?}; cached cluster state may be incomplete"
            );
        }
    }
}
