//! `/metrics`, `/healthz`, `/readyz`: HTTP on a thread and runtime of its own, so that a stuck agent still answers.
//!
//! Owns the listener and the judgement "alive": the task that owns the state answers a ping now and then. "Ready" is
//! said by that task itself ([`Status::not_ready`]); what it last said is shown together with how long ago it was
//! alive. Knows no table and no socket of the local API.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, extract::State, response::Response, routing::get};
use serde_json::json;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time,
};

use crate::{
    api::{query::Query, views::Status},
    http::{self, HttpError},
    metrics::Metrics,
};

/// Between two pings of the task that owns the state.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Silence of that task after which the agent counts as dead. A first sync of a large cluster takes seconds.
const DEAD_AFTER: Duration = Duration::from_secs(60);

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
    ) -> Result<Self, HttpError> {
        let sources = Sources { status, pulse: Arc::new(Pulse::new()), metrics };
        let pinging = ping(queries, Arc::clone(&sources.pulse));
        let router = Router::new()
            .route("/metrics", get(metrics_text))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .with_state(sources);
        Ok(Self { address: http::serve(address, router, pinging)? })
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

async fn metrics_text(State(sources): State<Sources>) -> Response {
    // a scrape reads maps: milliseconds that must not delay a probe
    match tokio::task::spawn_blocking(move || sources.metrics.encode()).await {
        Ok(text) => http::openmetrics(text),
        Err(error) => http::failure("metrics", &error),
    }
}

async fn healthz(State(sources): State<Sources>) -> Response {
    let silence = sources.pulse.silence();
    let alive = silence < DEAD_AFTER;
    http::judgement(alive, &json!({ "alive": alive, "silent_seconds": silence.as_secs() }))
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
    http::judgement(status.is_ready(), &body)
}
