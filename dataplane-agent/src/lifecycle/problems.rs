//! What is wrong with the node itself, by subject, for those who show it.

use std::collections::BTreeMap;

use tokio::sync::watch;

use crate::api::views::{Origin, ProblemView};

/// Where the parts of the lifecycle put what is wrong. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct NodeProblems(watch::Sender<BTreeMap<&'static str, Vec<ProblemView>>>);

impl NodeProblems {
    pub(super) fn new() -> (Self, Problems) {
        let (sender, receiver) = watch::channel(BTreeMap::new());
        (Self(sender), Problems(receiver))
    }

    /// All that is wrong in a part's eyes, from now on.
    pub(super) fn set(&self, part: &'static str, problems: Vec<ProblemView>) {
        self.0.send_if_modified(|node_problems| {
            if node_problems.get(part).map_or(&[][..], Vec::as_slice) == problems {
                return false;
            }
            for problem in &problems {
                tracing::warn!(
                    subject = problem.subject,
                    reason = problem.message,
                    "the node is not as it should be"
                );
            }
            node_problems.insert(part, problems);
            true
        });
    }
}

/// What is wrong with the node itself.
#[derive(Clone, Debug)]
pub struct Problems(watch::Receiver<BTreeMap<&'static str, Vec<ProblemView>>>);

impl Problems {
    pub fn now(&self) -> Vec<ProblemView> {
        self.0.borrow().values().flatten().cloned().collect()
    }

    /// Until it is something else. Never, once nobody looks any more.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Something that is wrong with the node itself.
pub(super) fn problem(subject: &str, message: String) -> ProblemView {
    ProblemView { origin: Origin::Node, subject: subject.to_owned(), message }
}
