//! `run`: starts the parts of the agent and connects them.
//!
//! The API socket, health and metrics start first, so that they can report what is missing. Then
//! the source sends its events to the node task ([`node`]). Stopping the agent removes nothing: the
//! programs keep running.

mod config_watch;
mod datapath;
mod egress;
mod forwarding_watch;
mod latency;
mod network_plan;
mod node;
mod pending_pods;
mod pods;
mod programs;
mod reserved_ports;
mod source;
mod xdp_check;

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
    netlink::{IpsecMonitor, Netlink, NetlinkError},
    source::{ManifestError, Problems},
    telemetry::{self, TelemetryError},
};

/// Threads of the runtime: one for the node task, one for all others.
const THREADS: usize = 2;
/// Capacity of the channel of source events.
const EVENT_QUEUE: usize = 1_024;
/// Capacity of the channel of API queries.
const QUERY_QUEUE: usize = 64;

/// Error that stops the agent.
#[derive(Debug, thiserror::Error)]
enum AppError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("cannot start the async runtime: {0}")]
    Runtime(#[source] std::io::Error),
    #[error("cannot install signal handlers: {0}")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Manifests(#[from] ManifestError),
    #[error("the source of cluster objects panicked: {0}")]
    Panicked(#[source] tokio::task::JoinError),
    #[error(transparent)]
    Node(#[from] node::NodeError),
    #[error(transparent)]
    Install(#[from] InstallError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

/// Runs the agent until it gets SIGTERM or SIGINT. An error is printed to stderr.
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
    runtime.block_on(serve_node(config, args.clone()))
}

async fn serve_node(config: Config, args: RunArgs) -> Result<(), AppError> {
    tracing::info!(node = config.node_name, version = env!("CARGO_PKG_VERSION"), "starting dataplane-agent");
    let mut terminate = signal(SignalKind::terminate()).map_err(AppError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AppError::Signals)?;

    let instance = Instance::acquire(&config.run_dir)?;
    let (status, status_receiver) = watch::channel(Status::starting(&config.node_name));
    let (queries, query_receiver) = mpsc::channel(QUERY_QUEUE);
    let metrics = Arc::new(Metrics::new(status_receiver.clone()));
    let api = Api::new(status_receiver.clone(), queries.clone(), Arc::clone(&metrics));
    tokio::spawn(serve(instance.listen()?, Arc::clone(&api), Limits::default()));
    if let Some(address) = config.http_bind_address {
        let health = Health::start(address, status_receiver.clone(), queries, Arc::clone(&metrics))?;
        tracing::info!("serving metrics and health on http://{}", health.address());
    }

    let (events, event_receiver) = mpsc::channel(EVENT_QUEUE);
    let problems = Problems::default();
    metrics.set_source(problems.clone());
    let problem_receiver = problems.subscribe();
    let mut source = source::SourceHandle::start(&config, events, problems).await?;
    metrics.set_progress(source.progress.clone());

    let (health_checks, health_check_receiver) = watch::channel(HealthChecks::default());
    let node_problems =
        start_lifecycle(&config, &status_receiver, health_check_receiver, source.client.clone())?;
    let inputs = node::Inputs {
        node_problems,
        events: event_receiver,
        problems: problem_receiver,
        behind: source.progress.subscribe(),
        progress: source.progress.clone(),
        queries: query_receiver,
        monitor: Netlink::monitor()?,
        ipsec: IpsecMonitor::open()?,
        config: config_watch::watch(args, config.clone()),
    };
    let outputs = node::Outputs { status, health_checks };
    let (node, requests) = node::NodeTask::new(config, Netlink::connect()?, api, outputs, &metrics);
    tokio::select! {
        done = node.run(inputs, requests) => done?,
        done = source.ended() => return done,
        _ = terminate.recv() => tracing::info!("got SIGTERM: stopping; the eBPF programs keep running"),
        _ = interrupt.recv() => tracing::info!("got SIGINT: stopping; the eBPF programs keep running"),
    }
    source.stop().await;
    Ok(())
}

/// Starts [`lifecycle`]: CNI installation, the Node's condition and taint, Events, health checks.
fn start_lifecycle(
    config: &Config,
    status: &watch::Receiver<Status>,
    health_checks: watch::Receiver<HealthChecks>,
    client: Option<Client>,
) -> Result<lifecycle::Problems, AppError> {
    let Cni { install, bin_dir, conf_dir } = &config.cni;
    let install = install.then(|| Install::new(bin_dir, conf_dir, &config.run_dir)).transpose()?;
    let proxy = ProxyAddresses { health: config.healthz_bind_address, mode: config.proxy_mode_bind_address };
    let lifecycle = Lifecycle {
        install,
        client,
        proxy,
        health_checks,
        ..Lifecycle::new(&config.node_name, Netlink::connect()?)
    };
    Ok(lifecycle.start(status))
}
