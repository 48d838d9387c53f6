//! kube-proxy's health and mode, for those who ask kube-proxy: load balancers probe `/healthz` on port 10256 of every
//! node before they send it anything, and stop when the node is on its way out.
//!
//! Same paths, codes and words as kube-proxy's (`pkg/proxy/healthcheck/proxy_health.go`). On a thread of its own, as
//! [`crate::health`]. Owns the judgement whether tables lag; whether the node leaves comes with the published status. A
//! port that is taken (by a kube-proxy that still runs) keeps nobody from anything: it is tried again.

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

/// Changes that are not in the tables for so long are late: twice kube-proxy's `syncPeriod`.
const LATE: Duration = Duration::from_secs(60);
/// What kube-proxy would say its mode is.
const MODE: &str = "ebpf";
/// A port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// As Go writes a time.
const TIME: &str = "%Y-%m-%d %H:%M:%S.%9f +0000 UTC";

/// Where to answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProxyAddresses {
    /// `/healthz` and `/livez`.
    pub health: Option<SocketAddr>,
    /// `/proxyMode`.
    pub mode: Option<SocketAddr>,
}

/// Whether the tables follow what the source says.
#[derive(Debug)]
pub(super) struct Lag {
    /// Since when something is not in them; `None`: all is.
    since: Option<Instant>,
    applied: u64,
    /// When the tables last took something.
    updated: Timestamp,
    /// Why the node leaves the cluster, if it does.
    leaving: Option<String>,
}

pub(super) type Shared = Arc<Mutex<Lag>>;

/// Whether the tables follow what the source says.
pub(super) fn is_healthy(lag: &Shared) -> bool {
    !lock(lag).is_late(Instant::now())
}

/// Answers until the process ends.
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
            tokio::spawn(service_health::answer(checks, Arc::clone(&lag), node_problems.clone()));
            if let Some(address) = addresses.mode {
                let router = Router::new().route("/proxyMode", get(|| async { MODE }));
                tokio::spawn(serve("proxy_mode", address, router, node_problems));
            }
            follow(status, &lag).await;
        });
    })?;
    Ok(())
}

async fn serve(key: &'static str, address: SocketAddr, router: Router, node_problems: NodeProblems) {
    loop {
        let listener = match TcpListener::bind(address).await {
            Ok(listener) => listener,
            Err(error) => {
                let message = format!("{address} cannot be listened on: {error}; does kube-proxy run here?");
                node_problems.set(key, vec![problem(key, message)]);
                sleep(RETRY).await;
                continue;
            }
        };
        node_problems.set(key, Vec::new());
        tracing::info!(%address, "{key}");
        if let Err(error) = axum::serve(listener, router.clone()).await {
            tracing::error!(%error, "{key}: stopped");
        }
        sleep(RETRY).await;
    }
}

async fn follow(mut status: watch::Receiver<Status>, lag: &Shared) {
    loop {
        lock(lag).observe(&status.borrow_and_update(), Instant::now());
        if status.changed().await.is_err() {
            // the agent is stopping: until its end it is what it was
            return std::future::pending().await;
        }
    }
}

fn lock(lag: &Shared) -> std::sync::MutexGuard<'_, Lag> {
    lag.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Lag {
    fn default() -> Self {
        Self::new()
    }
}

impl Lag {
    /// Healthy while it is starting.
    fn new() -> Self {
        Self { since: None, applied: 0, updated: Timestamp::now(), leaving: None }
    }

    fn observe(&mut self, status: &Status, now: Instant) {
        // keys that wait for a retry are told by name; the rest of the node is fine, and traffic is not to leave it
        let lags = status.applied_revision < status.revision && status.reconcile.pending == 0;
        if !lags {
            self.since = None;
        } else if self.since.is_none() || status.applied_revision != self.applied {
            // what moves is not stuck
            self.since = Some(now);
        }
        if status.applied_revision != self.applied {
            self.applied = status.applied_revision;
            self.updated = Timestamp::now();
        }
        self.leaving.clone_from(&status.leaving);
    }

    /// Tables that do not follow.
    #[cfg(test)]
    pub(super) fn late() -> Self {
        Self { since: Instant::now().checked_sub(LATE), ..Self::new() }
    }

    fn is_late(&self, now: Instant) -> bool {
        self.since.is_some_and(|since| now.duration_since(since) >= LATE)
    }
}

async fn healthz(State(lag): State<Shared>) -> Response {
    let lag = lock(&lag);
    let eligible = lag.leaving.is_none();
    answer(&lag, eligible, &format!(", \"nodeEligible\": {eligible}"))
}

/// Whether the node leaves is no reason to restart anything.
async fn livez(State(lag): State<Shared>) -> Response {
    answer(&lock(&lag), true, "")
}

fn answer(lag: &Lag, eligible: bool, more: &str) -> Response {
    let now = Timestamp::now();
    let healthy = eligible && !lag.is_late(Instant::now());
    // who is healthy is so now, whether anything changed or not: as kube-proxy has it
    let updated = if healthy { now } else { lag.updated };
    let body = format!(
        "{{\"lastUpdated\": \"{}\",\"currentTime\": \"{}\"{more}}}",
        updated.strftime(TIME),
        now.strftime(TIME)
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

    async fn ask(lag: &Shared, path: &str) -> (u16, String) {
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
    async fn a_node_that_leaves_is_not_healthy_and_alive() {
        let lag = Arc::new(Mutex::new(Lag::new()));
        let (code, body) = ask(&lag, "/healthz").await;
        assert_eq!(code, 200, "while it is starting");
        let read: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(read["nodeEligible"], true);
        assert_eq!(read["lastUpdated"], read["currentTime"]);
        let mut leaving = status(1, 1);
        leaving.leaving = Some("it is being deleted".to_owned());
        lock(&lag).observe(&leaving, Instant::now());
        let (code, body) = ask(&lag, "/healthz").await;
        assert_eq!(code, 503);
        assert!(body.ends_with(", \"nodeEligible\": false}"), "{body}");
        let (code, body) = ask(&lag, "/livez").await;
        assert_eq!(code, 200);
        assert!(!body.contains("nodeEligible"), "{body}");
    }

    #[test]
    fn tables_that_lag_and_do_not_move_are_late() {
        let (mut lag, now) = (Lag::new(), Instant::now());
        lag.observe(&status(5, 3), now);
        assert!(!lag.is_late(now + LATE / 2));
        assert!(lag.is_late(now + LATE));
        lag.observe(&status(7, 3), now + LATE / 2);
        assert!(lag.is_late(now + LATE), "more to do is no progress");
        lag.observe(&status(7, 4), now + LATE);
        assert!(!lag.is_late(now + LATE), "progress is");
        lag.observe(&status(7, 7), now + LATE * 2);
        assert!(!lag.is_late(now + LATE * 9));
    }

    #[test]
    fn a_key_that_waits_for_room_drains_no_node() {
        let (mut lag, now) = (Lag::new(), Instant::now());
        let mut full = status(5, 3);
        full.reconcile.pending = 1;
        lag.observe(&full, now);
        assert!(!lag.is_late(now + LATE * 2));
    }
}
