//! Says on the Node object whether pods can be connected: its condition, and the startup taint.
//!
//! Owns the requests; what to write is [`condition`]'s and [`taint`]'s. Writes when something changed, looks now and then
//! whether somebody else did, and tries again with growing patience when the API server cannot be asked.

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
    condition::{self, Judge, Wanted},
    problems::{NodeProblems, problem},
    taint,
};
use crate::{api::views::Status, cluster::explain};

/// An API server that does not answer keeps nobody for longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The first wait after a failure; each doubles it.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// Somebody else may write the condition, or put the taint back.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
/// A reason that changes all the time is not worth a write each.
const SAME_STATUS: Duration = Duration::from_secs(30);
/// Writers of taints met in a row.
const ATTEMPTS: u32 = 8;
const PART: &str = "node";

/// Why the Node does not say it.
#[derive(Debug, thiserror::Error)]
enum NodeError {
    #[error("{}", explain(.0))]
    Api(#[from] kube::Error),
    #[error("no answer within {PATIENCE:?}")]
    Silence,
    #[error("there is no Node object {0} yet")]
    Absent(String),
    #[error("taints of the node change all the time")]
    Taints,
}

/// Writes the Node.
pub(super) struct NodeWriter {
    nodes: Api<Node>,
    name: String,
    status: watch::Receiver<Status>,
    judge: Judge,
    node_problems: NodeProblems,
    /// Identity of the Node, for Events.
    uid: watch::Sender<Option<String>>,
    /// What was written last, and when.
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
        let (uid, known) = watch::channel(None);
        let writer = Self {
            nodes: Api::all(client),
            name: name.to_owned(),
            status,
            judge: Judge::new(Instant::now(), grace),
            node_problems,
            uid,
            written: None,
        };
        (writer, known)
    }

    /// For ever, or until the agent ends.
    pub(super) async fn run(mut self) {
        let mut wait = FIRST_RETRY;
        loop {
            let now = Instant::now();
            let wanted = self.judge.judge(&self.status.borrow_and_update(), now);
            let grace = self.judge.due().filter(|due| *due > now);
            let mut next = grace.unwrap_or(now + LOOK_AGAIN);
            if let Some(wanted) = wanted {
                let due = self.due(&wanted, now);
                if due > now {
                    next = next.min(due);
                } else {
                    match self.write(&wanted).await {
                        Ok(()) => {
                            self.node_problems.set(PART, Vec::new());
                            self.written = Some((wanted, now));
                            next = now + LOOK_AGAIN;
                            wait = FIRST_RETRY;
                        }
                        Err(error) => {
                            let message =
                                format!("its condition {} cannot be kept: {error}", condition::TYPE);
                            self.node_problems
                                .set(PART, vec![problem(&format!("Node {}", self.name), message)]);
                            // not all agents of a cluster at once
                            let chance = 0.5
                                + f64::from(Timestamp::now().subsec_nanosecond().unsigned_abs() % 1_000)
                                    / 2_000.0;
                            next = Instant::now() + wait.mul_f64(chance);
                            wait = (wait * 2).min(LAST_RETRY);
                            // whatever changes meanwhile, the API server is asked no sooner
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

    /// When this is to be written.
    fn due(&self, wanted: &Wanted, now: Instant) -> Instant {
        match &self.written {
            Some((written, at)) if written == wanted => *at + LOOK_AGAIN,
            Some((written, at)) if written.unavailable == wanted.unavailable => *at + SAME_STATUS,
            _ => now,
        }
    }

    async fn write(&self, wanted: &Wanted) -> Result<(), NodeError> {
        let found = patient(self.nodes.get_opt(&self.name)).await?;
        let mut node = found.ok_or_else(|| NodeError::Absent(self.name.clone()))?;
        self.uid.send_if_modified(|uid| {
            let changed = *uid != node.metadata.uid;
            uid.clone_from(&node.metadata.uid);
            changed
        });
        let how = PatchParams::default();
        if let Some(patch) = condition::patch(&node, wanted, Timestamp::now()) {
            node = patient(self.nodes.patch_status(&self.name, &how, &Patch::Strategic(patch))).await?;
            tracing::info!(
                unavailable = wanted.unavailable,
                reason = wanted.message,
                "condition {}",
                condition::TYPE
            );
        }
        if wanted.unavailable {
            return Ok(());
        }
        for _ in 0..ATTEMPTS {
            let Some(patch) = taint::patch(&node) else { return Ok(()) };
            match patient(self.nodes.patch(&self.name, &how, &Patch::Merge(patch))).await {
                Ok(_) => {
                    tracing::info!(taint = taint::KEY, "removed");
                    return Ok(());
                }
                // somebody wrote the Node meanwhile
                Err(NodeError::Api(kube::Error::Api(status))) if status.code == 409 => {
                    node = patient(self.nodes.get(&self.name)).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(NodeError::Taints)
    }
}

async fn patient<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, NodeError> {
    match timeout(PATIENCE, request).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(NodeError::Silence),
    }
}
