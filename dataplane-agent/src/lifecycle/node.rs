//! Writes the Node: its condition `NetworkUnavailable`, and the removal of the startup taint.
//!
//! Owns the requests; [`condition`] and [`taint`] compute the patches. Writes on change, checks
//! periodically whether others changed the Node, and retries with exponential back-off.

use std::time::{Duration, Instant};

use k8s_openapi::{api::core::v1::Node, jiff::Timestamp};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use tokio::{
    sync::watch,
    time::{sleep_until, timeout},
};

use super::{
    condition::{self, ReadinessTracker, Wanted},
    problems::{NodeProblems, problem},
    taint,
};
use crate::{api::views::Status, cluster::explain};

/// Timeout of a request to the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest wait after a failure; each failure doubles it.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// Interval of the check whether others changed the condition or added the taint again.
const RECHECK_INTERVAL: Duration = Duration::from_secs(300);
/// Shortest time between two writes that change only reason and message.
const MESSAGE_INTERVAL: Duration = Duration::from_secs(30);
/// Attempts to patch the taints after conflicts.
const CONFLICT_ATTEMPTS: u32 = 8;
const PROBLEM_KEY: &str = "node";

/// Error while the Node is written.
#[derive(Debug, thiserror::Error)]
enum NodeError {
    #[error("{}", explain(.0))]
    Api(#[from] kube::Error),
    #[error("the API server did not answer within {REQUEST_TIMEOUT:?}")]
    Timeout,
    #[error("there is no Node object {0} yet")]
    Absent(String),
    #[error("cannot remove the startup taint: {CONFLICT_ATTEMPTS} conflicts with other writers of the Node")]
    Conflicts,
}

/// Writes the Node.
pub(super) struct NodeWriter {
    nodes: Api<Node>,
    name: String,
    status: watch::Receiver<Status>,
    readiness: ReadinessTracker,
    node_problems: NodeProblems,
    /// UID of the Node, for Events.
    uid: watch::Sender<Option<String>>,
    /// The last written condition, and when.
    written: Option<(Wanted, Instant)>,
}

impl NodeWriter {
    pub(super) fn new(
        client: Client,
        name: &str,
        status: watch::Receiver<Status>,
        grace: Duration,
        node_problems: NodeProblems,
    ) -> (Self, watch::Receiver<Option<String>>) {
        let (uid, uid_receiver) = watch::channel(None);
        let writer = Self {
            nodes: Api::all(client),
            name: name.to_owned(),
            status,
            readiness: ReadinessTracker::new(Instant::now(), grace),
            node_problems,
            uid,
            written: None,
        };
        (writer, uid_receiver)
    }

    /// Runs until the agent stops.
    pub(super) async fn run(mut self) {
        let mut wait = FIRST_RETRY;
        loop {
            let now = Instant::now();
            let wanted = self.readiness.update(&self.status.borrow_and_update(), now);
            let grace = self.readiness.deadline().filter(|deadline| *deadline > now);
            let mut next = grace.unwrap_or(now + RECHECK_INTERVAL);
            if let Some(wanted) = wanted {
                let due = self.write_time(&wanted, now);
                if due > now {
                    next = next.min(due);
                } else {
                    match self.write(&wanted).await {
                        Ok(()) => {
                            self.node_problems.set(PROBLEM_KEY, Vec::new());
                            self.written = Some((wanted, now));
                            next = now + RECHECK_INTERVAL;
                            wait = FIRST_RETRY;
                        }
                        Err(error) => {
                            let message =
                                format!("cannot update its condition {}, retrying: {error}", condition::TYPE);
                            self.node_problems
                                .set(PROBLEM_KEY, vec![problem(&format!("Node {}", self.name), message)]);
                            // jitter: the agents of a cluster must not retry at the same time
                            let jitter = 0.5
                                + f64::from(Timestamp::now().subsec_nanosecond().unsigned_abs() % 1_000)
                                    / 2_000.0;
                            next = Instant::now() + wait.mul_f64(jitter);
                            wait = (wait * 2).min(LAST_RETRY);
                            // status changes must not shorten the wait
                            sleep_until(next.into()).await;
                            continue;
                        }
                    }
                }
            }
            tokio::select! {
                changed = self.status.changed() => if changed.is_err() { return },
                () = sleep_until(next.into()) => {}
            }
        }
    }

    /// When the condition may be written.
    fn write_time(&self, wanted: &Wanted, now: Instant) -> Instant {
        match &self.written {
            Some((written, at)) if written == wanted => *at + RECHECK_INTERVAL,
            Some((written, at)) if written.unavailable == wanted.unavailable => *at + MESSAGE_INTERVAL,
            _ => now,
        }
    }

    async fn write(&self, wanted: &Wanted) -> Result<(), NodeError> {
        let found = with_timeout(self.nodes.get_opt(&self.name)).await?;
        let mut node = found.ok_or_else(|| NodeError::Absent(self.name.clone()))?;
        self.uid.send_if_modified(|uid| {
            let changed = *uid != node.metadata.uid;
            uid.clone_from(&node.metadata.uid);
            changed
        });
        let params = PatchParams::default();
        if let Some(patch) = condition::patch(&node, wanted, Timestamp::now()) {
            node =
                with_timeout(self.nodes.patch_status(&self.name, &params, &Patch::Strategic(patch))).await?;
            tracing::info!(
                unavailable = wanted.unavailable,
                reason = wanted.message,
                "updated condition {} of Node {}",
                condition::TYPE,
                self.name
            );
        }
        if wanted.unavailable {
            return Ok(());
        }
        for _ in 0..CONFLICT_ATTEMPTS {
            let Some(patch) = taint::patch(&node) else { return Ok(()) };
            match with_timeout(self.nodes.patch(&self.name, &params, &Patch::Merge(patch))).await {
                Ok(_) => {
                    tracing::info!("removed taint {} from Node {}", taint::KEY, self.name);
                    return Ok(());
                }
                // conflict: the Node was written in between
                Err(NodeError::Api(kube::Error::Api(status))) if status.code == 409 => {
                    node = with_timeout(self.nodes.get(&self.name)).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(NodeError::Conflicts)
    }
}

async fn with_timeout<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, NodeError> {
    match timeout(REQUEST_TIMEOUT, request).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(NodeError::Timeout),
    }
}
