//! Objects and files that a source cannot use, for `status` and the metrics.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::watch;

/// A current problem.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file and object, or another subject.
    pub subject: String,
    /// The field and the reason.
    pub message: String,
}

/// The current problems of a source, shared with the API and the metrics.
#[derive(Clone, Debug)]
pub struct Problems {
    current: watch::Sender<Vec<Problem>>,
    total: Arc<AtomicU64>,
}

impl Default for Problems {
    fn default() -> Self {
        Self { current: watch::Sender::new(Vec::new()), total: Arc::default() }
    }
}

impl Problems {
    /// Receives every change of the list of current problems.
    pub fn subscribe(&self) -> watch::Receiver<Vec<Problem>> {
        self.current.subscribe()
    }

    /// The current problems, sorted.
    pub fn current(&self) -> Vec<Problem> {
        self.current.borrow().clone()
    }

    /// Number of problems since the start. A problem that is resolved and returns counts twice.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Replaces the current problems. Logs each new and each resolved one.
    pub(super) fn replace(&self, problems: BTreeSet<Problem>) {
        self.current.send_if_modified(|current| {
            for new in problems.iter().filter(|problem| current.binary_search(problem).is_err()) {
                tracing::warn!(subject = new.subject, problem = new.message, "source problem found");
                self.total.fetch_add(1, Ordering::Relaxed);
            }
            for old in current.iter().filter(|problem| !problems.contains(problem)) {
                tracing::info!(subject = old.subject, problem = old.message, "source problem resolved");
            }
            let changed = !current.iter().eq(&problems);
            if changed {
                *current = problems.into_iter().collect();
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(messages: &[&str]) -> BTreeSet<Problem> {
        messages
            .iter()
            .map(|message| Problem { subject: "a.yaml".to_owned(), message: (*message).to_owned() })
            .collect()
    }

    #[test]
    fn problem_is_counted_once_while_it_lasts() {
        let shared = Problems::default();
        let mut updates = shared.subscribe();
        shared.replace(problems(&["one", "two"]));
        assert!(updates.has_changed().unwrap());
        updates.mark_unchanged();
        shared.replace(problems(&["two", "one"]));
        assert!(!updates.has_changed().unwrap());
        assert_eq!(shared.total(), 2);
        shared.replace(problems(&["two", "three"]));
        assert_eq!((shared.current().len(), shared.total()), (2, 3));
        shared.replace(problems(&["one"]));
        assert_eq!((shared.current().len(), shared.total()), (1, 4));
    }
}
