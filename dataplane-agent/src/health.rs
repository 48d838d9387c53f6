//! `/metrics`, `/healthz`, `/readyz`: HTTP on a thread and runtime of its own, so that a stuck agent still answers.
//!
//! Owns the listener and the judgement "alive": the task that owns the state answers a ping now and then. "Ready" is
//! said by that task itself ([`Status::not_ready`]); what it last said is shown together with how long ago it was
//! alive. Knows no table and no socket of the local API.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time,
};

use crate::{
    api::{query::Query, views::Status},
    metrics::Metrics,
};

/// Between two pings of the task that owns the state.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Silence of that task after which the agent counts as dead. A first sync of a large cluster takes seconds.
const DEAD_AFTER: Duration = Duration::from_secs(60);

/// Why there is no HTTP.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    #[error("http: listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("http: start its thread: {0}")]
    Thread(#[source] io::Error),
}

/// What the answers are made of.
#[derive(Clone, Debug)]
struct Sources {
    status: watch::Receiver<Status>,
    pulse: Arc<Pulse>,
    metrics: Arc<Metrics>,
}

/// When the task that owns the state last answered.
#[derive(Debug)]
struct Pulse {
    start: Instant,
    /// Milliseconds after `start`.
    last: AtomicU64,
}

/// The running server. Dropping it leaves the thread running: it ends with the process.
#[derive(Debug)]
pub struct Health {
    address: SocketAddr,
}

impl Health {
    /// Where it listens: the port asked for, or the one the kernel chose for port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Listens on `address` and answers until the process ends.
    pub fn start(
        address: SocketAddr,
        status: watch::Receiver<Status>,
        queries: mpsc::Sender<Query>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, HealthError> {
        let listen = |source| HealthError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(listen)?;
        listener.set_nonblocking(true).map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(HealthError::Thread)?;
        let sources = Sources { status, pulse: Arc::new(Pulse::new()), metrics };
        thread::Builder::new()
            .name("http".to_owned())
            .spawn(move || runtime.block_on(serve(listener, sources, queries)))
            .map_err(HealthError::Thread)?;
        Ok(Self { address: bound })
    }
}

impl Pulse {
    fn new() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }

    fn beat(&self) {
        self.last.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }
}

async fn serve(listener: TcpListener, sources: Sources, queries: mpsc::Sender<Query>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "http: cannot serve");
            return;
        }
    };
    tokio::spawn(ping(queries, Arc::clone(&sources.pulse)));
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(sources);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "http: stopped");
    }
}

async fn ping(queries: mpsc::Sender<Query>, pulse: Arc<Pulse>) {
    let mut interval = time::interval(PING_INTERVAL);
    interval.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let (answer, answered) = oneshot::channel();
        if queries.send(Query::Ping(answer)).await.is_ok() && answered.await.is_ok() {
            pulse.beat();
        }
    }
}

async fn metrics(State(sources): State<Sources>) -> Response {
    // a scrape reads maps: milliseconds that must not delay a probe
    let text = tokio::task::spawn_blocking(move || sources.metrics.encode()).await;
    match text {
        Ok(text) => {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                .into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}\n")).into_response(),
    }
}

async fn healthz(State(sources): State<Sources>) -> Response {
    let silence = sources.pulse.silence();
    let alive = silence < DEAD_AFTER;
    answer(alive, &json!({ "alive": alive, "silent_seconds": silence.as_secs() }))
}

async fn readyz(State(sources): State<Sources>) -> Response {
    let status = sources.status.borrow().clone();
    let body = json!({
        "ready": status.is_ready(),
        "node": status.node,
        "revision": status.revision,
        "applied_revision": status.applied_revision,
        "not_ready": status.not_ready,
        "silent_seconds": sources.pulse.silence().as_secs(),
    });
    answer(status.is_ready(), &body)
}

fn answer(good: bool, body: &Value) -> Response {
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, [(header::CONTENT_TYPE, "application/json")], Body::from(format!("{body}\n"))).into_response()
}
