//! What the allocator counts, and where it says so: `/metrics`, `/healthz`, `/readyz`.
//!
//! On a thread of its own, as the agent's, so that a stuck allocator still answers. Knows neither nodes nor Lease.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
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
use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use serde_json::json;
use tokio::sync::watch;

use super::{book::Finding, election::Leadership, pool::Pool};

/// Before every name.
const PREFIX: &str = "dataplane_allocator";
/// Silence after which the allocator counts as dead.
const DEAD_AFTER: Duration = Duration::from_secs(60);

type Label = [(&'static str, &'static str); 1];

/// Why nobody can ask.
#[derive(Debug, thiserror::Error)]
pub(super) enum FiguresError {
    #[error("http: listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("http: start its thread: {0}")]
    Thread(#[source] io::Error),
}

/// The numbers.
#[derive(Debug)]
pub(super) struct Figures {
    registry: Registry,
    leader: Gauge,
    used: Family<Label, Gauge<u64, AtomicU64>>,
    free: Family<Label, Gauge<u64, AtomicU64>>,
    assignments: Counter,
    conflicts: Family<Label, Counter>,
    start: Instant,
    /// Milliseconds after `start` of the last sign of life.
    alive: AtomicU64,
    /// What was chosen has been compared with the nodes.
    checked: AtomicBool,
}

impl Default for Figures {
    fn default() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let (leader, assignments) = (Gauge::default(), Counter::default());
        let (used, free, conflicts) = (Family::default(), Family::default(), Family::default());
        registry.register("leader", "Whether this allocator leads", leader.clone());
        registry.register(
            "ranges_used",
            "Node ranges in use, as the leader knows them",
            Family::clone(&used),
        );
        registry.register("ranges_free", "Node ranges left, as the leader knows them", Family::clone(&free));
        registry.register("assignments", "Nodes that were given ranges", assignments.clone());
        registry.register(
            "conflicts",
            "Times something was found wrong with a node, by what it was",
            Family::clone(&conflicts),
        );
        let (alive, checked) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { registry, leader, used, free, assignments, conflicts, start: Instant::now(), alive, checked }
    }
}

impl Figures {
    /// This allocator leads, and the ranges are so.
    pub(super) fn leading(&self, pools: &[Pool]) {
        self.leader.set(1);
        for pool in pools {
            let label = [("family", if pool.cluster().addr().is_ipv4() { "ipv4" } else { "ipv6" })];
            let used = pool.used();
            self.used.get_or_create(&label).set(used.try_into().unwrap_or(u64::MAX));
            self.free.get_or_create(&label).set((pool.capacity() - used).try_into().unwrap_or(u64::MAX));
        }
    }

    /// Somebody else knows.
    pub(super) fn not_leading(&self) {
        self.leader.set(0);
        self.used.clear();
        self.free.clear();
    }

    pub(super) fn assigned(&self) {
        self.assignments.inc();
    }

    pub(super) fn found(&self, finding: &Finding) {
        self.conflicts.get_or_create(&[("reason", finding.reason())]).inc();
    }

    /// What was chosen fits the nodes.
    pub(super) fn checked(&self) {
        self.checked.store(true, Ordering::Relaxed);
    }

    /// The allocator's tasks have their turn.
    pub(super) fn beat(&self) {
        self.alive.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.alive.load(Ordering::Relaxed)))
    }
}

/// Answers on `address` until the process ends. Returns where: the kernel chooses for port 0.
pub(super) fn serve(
    address: SocketAddr,
    figures: Arc<Figures>,
    leadership: watch::Receiver<Leadership>,
) -> Result<SocketAddr, FiguresError> {
    let listen = |source| FiguresError::Listen { address, source };
    let listener = TcpListener::bind(address).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(FiguresError::Thread)?;
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state((figures, leadership));
    let answer = async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        axum::serve(listener, router).await
    };
    thread::Builder::new()
        .name("http".to_owned())
        .spawn(move || {
            if let Err(error) = runtime.block_on(answer) {
                tracing::error!(%error, "http: stopped");
            }
        })
        .map_err(FiguresError::Thread)?;
    Ok(bound)
}

type Shared = State<(Arc<Figures>, watch::Receiver<Leadership>)>;

async fn metrics(State((figures, _)): Shared) -> Response {
    let mut out = String::new();
    match text::encode(&mut out, &figures.registry) {
        Ok(()) => {
            let form = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, form)], out).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}\n")).into_response(),
    }
}

async fn healthz(State((figures, _)): Shared) -> Response {
    let silence = figures.silence();
    let alive = silence < DEAD_AFTER;
    answer(alive, &json!({ "alive": alive, "silent_seconds": silence.as_secs() }))
}

/// Ready is who could lead: it knows the nodes fit, and has heard of the Lease.
async fn readyz(State((figures, leadership)): Shared) -> Response {
    let said = leadership.borrow().clone();
    let ready = figures.checked.load(Ordering::Relaxed) && said.heard;
    let leads = said.leads(Instant::now());
    answer(ready, &json!({ "ready": ready, "leads": leads, "leader": said.holder }))
}

fn answer(good: bool, body: &serde_json::Value) -> Response {
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, [(header::CONTENT_TYPE, "application/json")], Body::from(format!("{body}\n"))).into_response()
}
