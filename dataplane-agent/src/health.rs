//! `/metrics`, `/healthz`, `/readyz`: HTTP on its own thread and runtime, so that a stuck agent
//! still answers.
//!
//! The agent is alive while the node task answers pings. It is ready if the node task says so
//! ([`Status::not_ready`]); `/readyz` also shows the time since the last ping. Knows no table and
//! no API socket.

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

/// Interval of pings to the node task.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Time without an answer after which `/healthz` fails. The first sync of a large cluster takes
/// seconds.
const LIVENESS_TIMEOUT: Duration = Duration::from_secs(60);

/// State of the HTTP handlers.
#[derive(Clone, Debug)]
struct Sources {
    status: watch::Receiver<Status>,
    heartbeat: Arc<Heartbeat>,
    metrics: Arc<Metrics>,
}

/// Time of the last ping that the node task answered.
#[derive(Debug)]
struct Heartbeat {
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
    /// The bound address; for port 0 with the port that the kernel chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves on `address` until the process ends.
    pub fn start(
        address: SocketAddr,
        status: watch::Receiver<Status>,
        queries: mpsc::Sender<Query>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, HttpError> {
        let sources = Sources { status, heartbeat: Arc::new(Heartbeat::new()), metrics };
        let pings = send_pings(queries, Arc::clone(&sources.heartbeat));
        let router = Router::new()
            .route("/metrics", get(metrics_text))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .with_state(sources);
        Ok(Self { address: http::serve(address, router, pings)? })
    }
}

impl Heartbeat {
    fn new() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }

    fn record(&self) {
        self.last.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn age(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }
}

async fn send_pings(queries: mpsc::Sender<Query>, heartbeat: Arc<Heartbeat>) {
    let mut interval = time::interval(PING_INTERVAL);
    interval.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let (reply, result) = oneshot::channel();
        if queries.send(Query::Ping(reply)).await.is_ok() && result.await.is_ok() {
            heartbeat.record();
        }
    }
}

async fn metrics_text(State(sources): State<Sources>) -> Response {
    // a scrape reads maps for milliseconds: it must not delay probes
    match tokio::task::spawn_blocking(move || sources.metrics.encode()).await {
        Ok(text) => http::openmetrics(text),
        Err(error) => http::failure("cannot collect metrics", &error),
    }
}

async fn healthz(State(sources): State<Sources>) -> Response {
    let age = sources.heartbeat.age();
    let alive = age < LIVENESS_TIMEOUT;
    http::probe_response(alive, &json!({ "alive": alive, "lastHeartbeatSecondsAgo": age.as_secs() }))
}

async fn readyz(State(sources): State<Sources>) -> Response {
    let status = sources.status.borrow().clone();
    let body = json!({
        "ready": status.is_ready(),
        "node": status.node,
        "revision": status.revision,
        "appliedRevision": status.applied_revision,
        "notReady": status.not_ready,
        "lastHeartbeatSecondsAgo": sources.heartbeat.age().as_secs(),
    });
    http::probe_response(status.is_ready(), &body)
}
