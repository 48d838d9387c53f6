//! Which source the agent has, started.

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

/// A source that is told to stop has this long to write down what it knows.
const FAREWELL: Duration = Duration::from_secs(2);

/// A source that runs.
pub(super) struct SourceHandle {
    task: JoinHandle<Result<(), ManifestError>>,
    stop: oneshot::Sender<()>,
    pub(super) progress: Progress,
    /// What it asks; others may, too.
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
            // told so, or nobody is left to tell
            let _told = stopped.await;
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

    /// Its end, which is an error or the agent's.
    pub(super) async fn ended(&mut self) -> Result<(), AppError> {
        Ok((&mut self.task).await.map_err(AppError::Panicked)??)
    }

    /// What it knows is on disk when this returns.
    pub(super) async fn stop(self) {
        // it may have ended by itself
        let _gone = self.stop.send(());
        if tokio::time::timeout(FAREWELL, self.task).await.is_err() {
            tracing::warn!("the source did not end in time: what it knows may not be on disk");
        }
    }
}
