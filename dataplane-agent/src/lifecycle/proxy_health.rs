//! kube-proxy's health and mode endpoints: load balancers probe `/healthz` on port 10256 of every
//! node, and stop sending connections to nodes that fail it.
//!
//! Same paths, codes and bodies as kube-proxy's (`pkg/proxy/healthcheck/proxy_health.go`). Runs on
//! its own thread, as [`crate::health`]. The node fails if its tables are late or if it is leaving
//! the cluster. A port that is in use (by a running kube-proxy) is retried.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
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
use k8s_openapi::jiff::Timestamp;
use tokio::{net::TcpListener, sync::watch, time::sleep};

use super::{
    problems::{NodeProblems, problem},
    service_health::{self, HealthChecks},
};
use crate::api::views::Status;

/// Time without progress after which the tables are late: twice kube-proxy's `syncPeriod`.
const LATE_AFTER: Duration = Duration::from_secs(60);
/// Answer of `/proxyMode`.
const MODE: &str = "ebpf";
/// Wait before a port in use is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Time format of Go's `Time.String`.
const TIME_FORMAT: &str = "%Y-%m-%d %H:%M:%S.%9f +0000 UTC";

/// Listen addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProxyAddresses {
    /// `/healthz` and `/livez`.
    pub health: Option<SocketAddr>,
    /// `/proxyMode`.
    pub mode: Option<SocketAddr>,
}

/// Tracks whether the tables follow the source.
#[derive(Debug)]
pub(super) struct Lag {
    /// Last progress while the tables lack a change; `None`: they are current.
    since: Option<Instant>,
    applied_revision: u64,
    /// When the applied revision last changed.
    updated: Timestamp,
    /// Why the node is leaving the cluster, if it is.
    leaving_reason: Option<String>,
}

pub(super) type SharedLag = Arc<Mutex<Lag>>;

/// True unless the tables are late.
pub(super) fn is_healthy(lag: &SharedLag) -> bool {
    !lock(lag).is_late(Instant::now())
}

/// Serves until the process ends.
pub(super) fn start(
    addresses: ProxyAddresses,
    checks: watch::Receiver<HealthChecks>,
    status: watch::Receiver<Status>,
    node_problems: NodeProblems,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let lag = Arc::new(Mutex::new(Lag::new()));
    thread::Builder::new().name("proxy-health".to_owned()).spawn(move || {
        runtime.block_on(async {
            if let Some(address) = addresses.health {
                let router = Router::new()
                    .route("/healthz", get(healthz))
                    .route("/livez", get(livez))
                    .with_state(Arc::clone(&lag));
                tokio::spawn(serve("healthz", address, router, node_problems.clone()));
            }
            tokio::spawn(service_health::serve(checks, Arc::clone(&lag), node_problems.clone()));
            if let Some(address) = addresses.mode {
                let router = Router::new().route("/proxyMode", get(|| async { MODE }));
                tokio::spawn(serve("proxyMode", address, router, node_problems));
            }
            observe_status(status, &lag).await;
        });
    })?;
    Ok(())
}

async fn serve(key: &'static str, address: SocketAddr, router: Router, node_problems: NodeProblems) {
    loop {
        let listener = match TcpListener::bind(address).await {
            Ok(listener) => listener,
            Err(error) => {
                let message = format!(
                    "cannot listen on {address}, retrying: {error}; check whether kube-proxy is running"
                );
                node_problems.set(key, vec![problem(key, message)]);
                sleep(RETRY).await;
                continue;
            }
        };
        node_problems.set(key, Vec::new());
        tracing::info!("serving {key} on http://{address}");
        if let Err(error) = axum::serve(listener, router.clone()).await {
            tracing::error!(%error, "{key} server on {address} stopped, restarting it");
        }
        sleep(RETRY).await;
    }
}

async fn observe_status(mut status: watch::Receiver<Status>, lag: &SharedLag) {
    loop {
        lock(lag).observe(&status.borrow_and_update(), Instant::now());
        if status.changed().await.is_err() {
            // the agent is stopping: keep the last state
            return std::future::pending().await;
        }
    }
}

fn lock(lag: &SharedLag) -> std::sync::MutexGuard<'_, Lag> {
    lag.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Lag {
    fn default() -> Self {
        Self::new()
    }
}

impl Lag {
    /// Healthy while the agent starts.
    fn new() -> Self {
        Self { since: None, applied_revision: 0, updated: Timestamp::now(), leaving_reason: None }
    }

    fn observe(&mut self, status: &Status, now: Instant) {
        // keys that wait for a retry are reported as problems; they do not make the node unhealthy
        let lags = status.applied_revision < status.revision && status.reconcile.pending == 0;
        if !lags {
            self.since = None;
        } else if self.since.is_none() || status.applied_revision != self.applied_revision {
            // progress restarts the time
            self.since = Some(now);
        }
        if status.applied_revision != self.applied_revision {
            self.applied_revision = status.applied_revision;
            self.updated = Timestamp::now();
        }
        self.leaving_reason.clone_from(&status.leaving_reason);
    }

    /// Tables that are late.
    #[cfg(test)]
    pub(super) fn late() -> Self {
        Self { since: Instant::now().checked_sub(LATE_AFTER), ..Self::new() }
    }

    fn is_late(&self, now: Instant) -> bool {
        self.since.is_some_and(|since| now.duration_since(since) >= LATE_AFTER)
    }
}

async fn healthz(State(lag): State<SharedLag>) -> Response {
    let lag = lock(&lag);
    let eligible = lag.leaving_reason.is_none();
    answer(&lag, eligible, &format!(", \"nodeEligible\": {eligible}"))
}

/// Whether the node leaves is no reason to restart anything.
async fn livez(State(lag): State<SharedLag>) -> Response {
    answer(&lock(&lag), true, "")
}

fn answer(lag: &Lag, eligible: bool, more: &str) -> Response {
    let now = Timestamp::now();
    let healthy = eligible && !lag.is_late(Instant::now());
    // kube-proxy reports the current time while it is healthy
    let updated = if healthy { now } else { lag.updated };
    let body = format!(
        "{{\"lastUpdated\": \"{}\",\"currentTime\": \"{}\"{more}}}",
        updated.strftime(TIME_FORMAT),
        now.strftime(TIME_FORMAT)
    );
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (code, headers, Body::from(body)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(revision: u64, applied_revision: u64) -> Status {
        Status { revision, applied_revision, ..Status::starting("n1") }
    }

    async fn probe(lag: &SharedLag, path: &str) -> (u16, String) {
        let answer = if path == "/healthz" {
            healthz(State(Arc::clone(lag))).await
        } else {
            livez(State(Arc::clone(lag))).await
        };
        let code = answer.status().as_u16();
        let body = axum::body::to_bytes(answer.into_body(), 4_096).await.unwrap();
        (code, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn leaving_node_fails_healthz_but_not_livez() {
        let lag = Arc::new(Mutex::new(Lag::new()));
        let (code, body) = probe(&lag, "/healthz").await;
        assert_eq!(code, 200, "while the agent starts");
        let read: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(read["nodeEligible"], true);
        assert_eq!(read["lastUpdated"], read["currentTime"]);
        let mut leaving = status(1, 1);
        leaving.leaving_reason = Some("it is being deleted".to_owned());
        lock(&lag).observe(&leaving, Instant::now());
        let (code, body) = probe(&lag, "/healthz").await;
        assert_eq!(code, 503);
        assert!(body.ends_with(", \"nodeEligible\": false}"), "{body}");
        let (code, body) = probe(&lag, "/livez").await;
        assert_eq!(code, 200);
        assert!(!body.contains("nodeEligible"), "{body}");
    }

    #[test]
    fn tables_are_late_without_progress() {
        let (mut lag, now) = (Lag::new(), Instant::now());
        lag.observe(&status(5, 3), now);
        assert!(!lag.is_late(now + LATE_AFTER / 2));
        assert!(lag.is_late(now + LATE_AFTER));
        lag.observe(&status(7, 3), now + LATE_AFTER / 2);
        assert!(lag.is_late(now + LATE_AFTER), "a newer revision of the state is not progress");
        lag.observe(&status(7, 4), now + LATE_AFTER);
        assert!(!lag.is_late(now + LATE_AFTER), "a newer applied revision is");
        lag.observe(&status(7, 7), now + LATE_AFTER * 2);
        assert!(!lag.is_late(now + LATE_AFTER * 9));
    }

    #[test]
    fn key_that_waits_for_a_retry_does_not_make_the_node_unhealthy() {
        let (mut lag, now) = (Lag::new(), Instant::now());
        let mut full = status(5, 3);
        full.reconcile.pending = 1;
        lag.observe(&full, now);
        assert!(!lag.is_late(now + LATE_AFTER * 2));
    }
}
