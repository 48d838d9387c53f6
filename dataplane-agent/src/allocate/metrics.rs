//! Metrics and health endpoints of the allocator: `/metrics`, `/healthz`, `/readyz`.
//!
//! Served by a thread of its own, so that a stuck allocator still responds. Knows neither nodes nor
//! Lease.

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

/// Prefix of all names.
const PREFIX: &str = "dataplane_allocator";
/// Time without a heartbeat after which `/healthz` fails.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(60);

type Label = [(&'static str, &'static str); 1];

/// The metrics and health state.
#[derive(Debug)]
pub(super) struct AllocatorMetrics {
    registry: Registry,
    leader: Gauge,
    used: Family<Label, Gauge<u64, AtomicU64>>,
    free: Family<Label, Gauge<u64, AtomicU64>>,
    assignments: Counter,
    conflicts: Family<Label, Counter>,
    start: Instant,
    /// Milliseconds from `start` to the last heartbeat.
    alive: AtomicU64,
    /// The settings were checked against the nodes.
    set_checked: AtomicBool,
}

impl Default for AllocatorMetrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let (leader, assignments) = (Gauge::default(), Counter::default());
        let (used, free, conflicts) = (Family::default(), Family::default(), Family::default());
        registry.register("leader", "Whether this allocator is the leader (1) or not (0)", leader.clone());
        registry.register(
            "ranges_used",
            "Node ranges in use, by address family; exported by the leader",
            Family::clone(&used),
        );
        registry.register(
            "ranges_free",
            "Free node ranges, by address family; exported by the leader",
            Family::clone(&free),
        );
        registry.register("assignments", "Nodes that were assigned pod CIDRs", assignments.clone());
        registry.register(
            "conflicts",
            "Problems found with pod CIDRs of nodes, by reason",
            Family::clone(&conflicts),
        );
        let (alive, set_checked) = (AtomicU64::new(0), AtomicBool::new(false));
        Self {
            registry,
            leader,
            used,
            free,
            assignments,
            conflicts,
            start: Instant::now(),
            alive,
            set_checked,
        }
    }
}

impl AllocatorMetrics {
    /// This allocator leads; sets the range gauges.
    pub(super) fn set_leading(&self, pools: &[Pool]) {
        self.leader.set(1);
        for pool in pools {
            let label = [("family", if pool.cluster().addr().is_ipv4() { "ipv4" } else { "ipv6" })];
            let used = pool.used();
            self.used.get_or_create(&label).set(used.try_into().unwrap_or(u64::MAX));
            self.free.get_or_create(&label).set((pool.capacity() - used).try_into().unwrap_or(u64::MAX));
        }
    }

    /// Another allocator leads: only the leader exports range gauges.
    pub(super) fn set_not_leading(&self) {
        self.leader.set(0);
        self.used.clear();
        self.free.clear();
    }

    pub(super) fn count_assignment(&self) {
        self.assignments.inc();
    }

    pub(super) fn count_finding(&self, finding: &Finding) {
        self.conflicts.get_or_create(&[("reason", finding.reason())]).inc();
    }

    /// The settings fit the nodes.
    pub(super) fn set_checked(&self) {
        self.set_checked.store(true, Ordering::Relaxed);
    }

    /// Records that the allocator's tasks make progress.
    pub(super) fn heartbeat(&self) {
        self.alive.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn since_heartbeat(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.alive.load(Ordering::Relaxed)))
    }
}

/// Serves on `address` until the process ends. Returns the bound address (port 0 is chosen by the
/// kernel).
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
    let since_heartbeat = allocator_metrics.since_heartbeat();
    let alive = since_heartbeat < HEARTBEAT_TIMEOUT;
    http::probe_response(
        alive,
        &json!({ "alive": alive, "lastHeartbeatSecondsAgo": since_heartbeat.as_secs() }),
    )
}

/// Ready to lead: the settings fit the nodes, and the Lease was read.
async fn readyz(State((allocator_metrics, leadership)): Shared) -> Response {
    let current = leadership.borrow().clone();
    let ready = allocator_metrics.set_checked.load(Ordering::Relaxed) && current.lease_seen;
    let leads = current.is_leader(Instant::now());
    http::probe_response(ready, &json!({ "ready": ready, "leads": leads, "leader": current.holder }))
}
