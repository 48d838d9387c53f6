//! `allocate`: assigns pod CIDRs to nodes, on clusters whose controller manager does not.
//!
//! A separate program: it runs anywhere, does not touch the kernel, and uses only Nodes and a
//! Lease. The rules are pure ([`pool`]: ranges, [`ledger`]: nodes, [`lease`]: leadership);
//! [`election`] and [`controller`] send the requests, [`metrics`] exports the state.

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

/// Delay between attempts to list the nodes at start.
const RETRY_PERIOD: Duration = Duration::from_secs(2);
/// Timeout of the first list.
const LIST_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of the heartbeat.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Why the allocator cannot run.
#[derive(Debug, thiserror::Error)]
enum AllocateError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("cannot start async runtime: {0}")]
    Runtime(#[source] std::io::Error),
    #[error("cannot install signal handler: {0}")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Http(#[from] HttpError),
}

/// Runs until it is signalled. Prints one sentence to stderr on failure.
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
    tracing::info!(identity = settings.identity, cluster_cidrs = ?clusters, "starting allocator");
    let mut terminate = signal(SignalKind::terminate()).map_err(AllocateError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AllocateError::Signals)?;
    let client = cluster::connect(&settings.access).await?;
    let allocator_metrics = Arc::new(AllocatorMetrics::default());
    let (mut election, leadership) = Election::new(client.clone(), &settings);
    let address = metrics::serve(settings.http, Arc::clone(&allocator_metrics), leadership.clone())?;
    tracing::info!(%address, "serving metrics and health");
    let stopped = tokio::select! {
        done = work(client, settings, leadership, &mut election, allocator_metrics) => done,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    // the controller has stopped: nothing is written any more
    election.release().await;
    stopped
}

/// Runs until the settings turn out not to fit the cluster.
async fn work(
    client: kube::Client,
    settings: Settings,
    leadership: watch::Receiver<Leadership>,
    election: &mut Election,
    allocator_metrics: Arc<AllocatorMetrics>,
) -> Result<(), AllocateError> {
    let heartbeat_metrics = Arc::clone(&allocator_metrics);
    let heartbeats = async move {
        let mut heartbeat = interval(HEARTBEAT);
        loop {
            heartbeat.tick().await;
            heartbeat_metrics.heartbeat();
        }
    };
    let working = async move {
        check(&client, &settings).await?;
        allocator_metrics.set_checked();
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
        () = heartbeats => Ok(()),
    }
}

/// Checks the settings against the existing nodes. Retries until the API server responds.
async fn check(client: &kube::Client, settings: &Settings) -> Result<(), SettingsError> {
    let mut last_error = None;
    loop {
        let reason = match timeout(LIST_TIMEOUT, nodes::list(client)).await {
            Ok(Ok(nodes)) => return settings.check(&nodes),
            Ok(Err(error)) => explain(&error),
            Err(_elapsed) => format!("no response within {LIST_TIMEOUT:?}"),
        };
        if last_error.as_ref() != Some(&reason) {
            tracing::warn!(reason, "cannot list nodes; retrying");
        }
        last_error = Some(reason);
        sleep(RETRY_PERIOD).await;
    }
}
