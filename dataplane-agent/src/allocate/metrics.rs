//! What the allocator counts, and where it says so: `/metrics`, `/healthz`, `/readyz`.
//!
//! On a thread of its own, as the agent's, so that a stuck allocator still answers. Knows neither nodes nor Lease.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, extract::State, response::Response, routing::get};
use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use serde_json::json;
use tokio::sync::watch;

use super::{election::Leadership, ledger::Finding, pool::Pool};
use crate::http::{self, HttpError};

/// Before every name.
const PREFIX: &str = "dataplane_allocator";
/// Silence after which the allocator counts as dead.
const DEAD_AFTER: Duration = Duration::from_secs(60);

type Label = [(&'static str, &'static str); 1];

/// The numbers.
#[derive(Debug)]
pub(super) struct AllocatorMetrics {
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

impl Default for AllocatorMetrics {
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

impl AllocatorMetrics {
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
    allocator_metrics: Arc<AllocatorMetrics>,
    leadership: watch::Receiver<Leadership>,
) -> Result<SocketAddr, HttpError> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state((allocator_metrics, leadership));
    http::serve(address, router, std::future::ready(()))
}

type Shared = State<(Arc<AllocatorMetrics>, watch::Receiver<Leadership>)>;

async fn metrics(State((allocator_metrics, _)): Shared) -> Response {
    let mut out = String::new();
    match text::encode(&mut out, &allocator_metrics.registry) {
        Ok(()) => http::openmetrics(out),
        Err(error) => http::failure("metrics", &error),
    }
}

async fn healthz(State((allocator_metrics, _)): Shared) -> Response {
    let silence = allocator_metrics.silence();
    let alive = silence < DEAD_AFTER;
    http::judgement(alive, &json!({ "alive": alive, "silent_seconds": silence.as_secs() }))
}

/// Ready is who could lead: it knows the nodes fit, and has heard of the Lease.
async fn readyz(State((allocator_metrics, leadership)): Shared) -> Response {
    let said = leadership.borrow().clone();
    let ready = allocator_metrics.checked.load(Ordering::Relaxed) && said.heard;
    let leads = said.leads(Instant::now());
    http::judgement(ready, &json!({ "ready": ready, "leads": leads, "leader": said.holder }))
}
