//! `allocate`: gives each node its ranges of pod addresses, on clusters that do not.
//!
//! A program of its own kind: it runs anywhere, touches no kernel, and knows only Nodes and a Lease. The rules are
//! pure ([`pool`]: ranges, [`ledger`]: nodes, [`lease`]: who leads); [`election`] and [`controller`] carry them to the
//! API server, [`metrics`] shows them.

mod controller;
mod election;
pub mod lease;
pub mod ledger;
mod metrics;
mod nodes;
pub mod pool;
mod settings;

use std::{process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{interval, sleep, timeout},
};

pub use settings::AllocateArgs;

use crate::{
    cluster::{self, ClusterError, explain},
    event_recorder::EventRecorder,
    http::HttpError,
    telemetry::{self, TelemetryError},
};
use controller::Controller;
use election::{Election, Leadership};
use metrics::AllocatorMetrics;
use settings::{Settings, SettingsError};

/// Between two attempts to see the nodes for the first time.
const RETRY: Duration = Duration::from_secs(2);
/// An API server that does not answer keeps nobody for longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two signs of life.
const BEAT: Duration = Duration::from_secs(2);

/// Why nothing is allocated.
#[derive(Debug, thiserror::Error)]
enum AllocateError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("start the runtime: {0}")]
    Runtime(#[source] std::io::Error),
    #[error("catch signals: {0}")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Http(#[from] HttpError),
}

/// Allocates until it is told to stop. One sentence to stderr if it cannot.
pub fn run(args: &AllocateArgs) -> ExitCode {
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dataplane-agent: allocate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &AllocateArgs) -> Result<(), AllocateError> {
    let settings = Settings::new(args)?;
    telemetry::init(&settings.log, settings.log_format)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AllocateError::Runtime)?;
    runtime.block_on(allocate(settings))
}

async fn allocate(settings: Settings) -> Result<(), AllocateError> {
    let clusters: Vec<_> = settings.pools.iter().map(|pool| pool.cluster().to_string()).collect();
    tracing::info!(identity = settings.identity, cluster_cidrs = ?clusters, "allocator");
    let mut terminate = signal(SignalKind::terminate()).map_err(AllocateError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AllocateError::Signals)?;
    let client = cluster::connect(&settings.access).await?;
    let allocator_metrics = Arc::new(AllocatorMetrics::default());
    let (mut election, leadership) = Election::new(client.clone(), &settings);
    let address = metrics::serve(settings.http, Arc::clone(&allocator_metrics), leadership.clone())?;
    tracing::info!(%address, "metrics and health");
    let stopped = tokio::select! {
        done = work(client, settings, leadership, &mut election, allocator_metrics) => done,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    // the controller is gone: nothing is written any more, and another one may lead
    election.release().await;
    stopped
}

/// For ever, unless the cluster is another one than was meant.
async fn work(
    client: kube::Client,
    settings: Settings,
    leadership: watch::Receiver<Leadership>,
    election: &mut Election,
    allocator_metrics: Arc<AllocatorMetrics>,
) -> Result<(), AllocateError> {
    let beats = Arc::clone(&allocator_metrics);
    let beating = async move {
        let mut beat = interval(BEAT);
        loop {
            beat.tick().await;
            beats.beat();
        }
    };
    let working = async move {
        check(&client, &settings).await?;
        allocator_metrics.checked();
        let recorder = EventRecorder::start(client.clone(), "dataplane-allocator", &settings.identity);
        let controller = Controller::new(client, settings, leadership, recorder, allocator_metrics);
        tokio::select! {
            () = election.run() => {}
            () = controller.run() => {}
        }
        Ok(())
    };
    tokio::select! {
        done = working => done,
        () = beating => Ok(()),
    }
}

/// Compares what was chosen with the nodes that are there. Asks until there is an answer.
async fn check(client: &kube::Client, settings: &Settings) -> Result<(), SettingsError> {
    let mut trouble = None;
    loop {
        let reason = match timeout(PATIENCE, nodes::list(client)).await {
            Ok(Ok(nodes)) => return settings.check(&nodes),
            Ok(Err(error)) => explain(&error),
            Err(_elapsed) => format!("no answer within {PATIENCE:?}"),
        };
        if trouble.as_ref() != Some(&reason) {
            tracing::warn!(reason, "nodes cannot be listed yet");
        }
        trouble = Some(reason);
        sleep(RETRY).await;
    }
}
