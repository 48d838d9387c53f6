//! `run`: the parts of the agent, started in order and wired together.
//!
//! Order matters to those who ask: the socket, health and metrics answer before anything else works, and say what is
//! missing. Then the source speaks to the one task that owns the state ([`node`]), which does everything else.
//! When the agent ends, nothing is taken down: the programs go on without it.

mod datapath;
mod latency;
mod network_plan;
mod node;
mod pending_pods;
mod pods;
mod programs;
mod reserved;
mod source;

use std::{process::ExitCode, sync::Arc};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    api::{
        answer::Api,
        instance::{Instance, InstanceError},
        server::{Limits, serve},
        views::Status,
    },
    cluster::{Client, ClusterError},
    config::{Cni, Config, ConfigError, RunArgs},
    health::Health,
    http::HttpError,
    lifecycle::{self, HealthChecks, Install, InstallError, Lifecycle, ProxyAddresses},
    metrics::Metrics,
    netlink::{Netlink, NetlinkError},
    source::{ManifestError, Problems},
    telemetry::{self, TelemetryError},
};

/// Threads of the runtime: the task that owns the state, and whatever else has something to do meanwhile.
const THREADS: usize = 2;
/// Events of the source that may wait.
const EVENTS: usize = 1_024;
/// Questions that may wait.
const QUERIES: usize = 64;

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
enum AppError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("start the runtime: {0}")]
    Runtime(#[source] std::io::Error),
    #[error("catch signals: {0}")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Manifests(#[from] ManifestError),
    #[error("the source: {0}")]
    Panicked(#[source] tokio::task::JoinError),
    #[error(transparent)]
    Node(#[from] node::NodeError),
    #[error(transparent)]
    Install(#[from] InstallError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

/// Runs the agent until it is told to stop. One sentence to stderr if it cannot.
pub fn run(args: &RunArgs) -> ExitCode {
    match start(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dataplane-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &RunArgs) -> Result<(), AppError> {
    let config = Config::load(args)?;
    telemetry::init(&config.log, config.log_format)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("dataplane")
        .enable_all()
        .build()
        .map_err(AppError::Runtime)?;
    runtime.block_on(serve_node(config))
}

async fn serve_node(config: Config) -> Result<(), AppError> {
    tracing::info!(node = config.node_name, version = env!("CARGO_PKG_VERSION"), "starting");
    let mut terminate = signal(SignalKind::terminate()).map_err(AppError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AppError::Signals)?;

    let instance = Instance::acquire(&config.run_dir)?;
    let (status, status_seen) = watch::channel(Status::starting(&config.node_name));
    let (queries, queries_asked) = mpsc::channel(QUERIES);
    let metrics = Arc::new(Metrics::new(status_seen.clone()));
    let api = Api::new(status_seen.clone(), queries.clone(), Arc::clone(&metrics));
    tokio::spawn(serve(instance.listen()?, Arc::clone(&api), Limits::default()));
    let status_seen_by_lifecycle = status_seen.clone();
    if let Some(address) = config.http {
        let health = Health::start(address, status_seen, queries, Arc::clone(&metrics))?;
        tracing::info!(address = %health.address(), "metrics and health");
    }

    let (events, events_heard) = mpsc::channel(EVENTS);
    let problems = Problems::default();
    metrics.set_source(problems.clone());
    let problems_seen = problems.subscribe();
    let mut source = source::SourceHandle::start(&config, events, problems).await?;
    metrics.set_progress(source.progress.clone());

    let (health_checks, health_checks_told) = watch::channel(HealthChecks::default());
    let node_problems =
        take_care(&config, &status_seen_by_lifecycle, health_checks_told, source.client.clone())?;
    let inputs = node::Inputs {
        node_problems,
        events: events_heard,
        problems: problems_seen,
        behind: source.progress.subscribe(),
        progress: source.progress.clone(),
        queries: queries_asked,
        monitor: Netlink::monitor()?,
    };
    let outputs = node::Outputs { status, health_checks };
    let (node, requests) = node::NodeTask::new(config, Netlink::connect()?, api, outputs, &metrics);
    tokio::select! {
        done = node.run(inputs, requests) => done?,
        done = source.ended() => return done,
        _ = terminate.recv() => tracing::info!("told to stop: the programs go on without the agent"),
        _ = interrupt.recv() => tracing::info!("interrupted: the programs go on without the agent"),
    }
    source.stop().await;
    Ok(())
}

/// The node's life in the cluster, as far as it is ours to take care of.
fn take_care(
    config: &Config,
    status: &watch::Receiver<Status>,
    health_checks: watch::Receiver<HealthChecks>,
    client: Option<Client>,
) -> Result<lifecycle::Problems, AppError> {
    let Cni { install, bin_dir, conf_dir } = &config.cni;
    let install = install.then(|| Install::new(bin_dir, conf_dir, &config.run_dir)).transpose()?;
    let proxy = ProxyAddresses { health: config.healthz, mode: config.proxy_mode };
    let lifecycle = Lifecycle {
        install,
        client,
        proxy,
        health_checks,
        ..Lifecycle::new(&config.node_name, Netlink::connect()?)
    };
    Ok(lifecycle.start(status))
}
