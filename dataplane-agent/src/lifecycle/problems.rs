//! Problems of the node, collected from the lifecycle tasks for the status.

use std::collections::BTreeMap;

use tokio::sync::watch;

use crate::api::views::{Origin, ProblemView};

/// Collects the problems that lifecycle tasks find. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct NodeProblems(watch::Sender<BTreeMap<&'static str, Vec<ProblemView>>>);

impl NodeProblems {
    pub(super) fn new() -> (Self, Problems) {
        let (sender, receiver) = watch::channel(BTreeMap::new());
        (Self(sender), Problems(receiver))
    }

    /// Replaces the problems of `task`, and logs new ones.
    pub(super) fn set(&self, task: &'static str, problems: Vec<ProblemView>) {
        self.0.send_if_modified(|node_problems| {
            if node_problems.get(task).map_or(&[][..], Vec::as_slice) == problems {
                return false;
            }
            for problem in &problems {
                tracing::warn!("{}: {}", problem.subject, problem.message);
            }
            node_problems.insert(task, problems);
            true
        });
    }
}

/// The current problems of the node.
#[derive(Clone, Debug)]
pub struct Problems(watch::Receiver<BTreeMap<&'static str, Vec<ProblemView>>>);

impl Problems {
    pub fn now(&self) -> Vec<ProblemView> {
        self.0.borrow().values().flatten().cloned().collect()
    }

    /// Waits for a change; for ever once all lifecycle tasks have ended.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A problem of origin `node`.
pub(super) fn problem(subject: &str, message: String) -> ProblemView {
    ProblemView { origin: Origin::Node, subject: subject.to_owned(), message }
}
