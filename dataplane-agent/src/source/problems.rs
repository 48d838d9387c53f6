//! What a source cannot use, for `status` and the metrics.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::watch;

/// Something that is wrong now.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file and the object, or what else it is about.
    pub subject: String,
    /// What is wrong: the field and a reason.
    pub message: String,
}

/// The problems of a source, shared between it and those who show them.
#[derive(Clone, Debug)]
pub struct Problems {
    now: watch::Sender<Vec<Problem>>,
    ever: Arc<AtomicU64>,
}

impl Default for Problems {
    fn default() -> Self {
        Self { now: watch::Sender::new(Vec::new()), ever: Arc::default() }
    }
}

impl Problems {
    /// Follows what is wrong.
    pub fn subscribe(&self) -> watch::Receiver<Vec<Problem>> {
        self.now.subscribe()
    }

    /// What is wrong now, in order.
    pub fn now(&self) -> Vec<Problem> {
        self.now.borrow().clone()
    }

    /// How many problems have come up since the start. One that goes and comes again counts twice.
    pub fn ever(&self) -> u64 {
        self.ever.load(Ordering::Relaxed)
    }

    /// From now on, exactly `problems` are wrong. Each is logged as it comes and as it goes.
    pub(super) fn replace(&self, problems: BTreeSet<Problem>) {
        self.now.send_if_modified(|now| {
            for new in problems.iter().filter(|problem| now.binary_search(problem).is_err()) {
                tracing::warn!(subject = new.subject, problem = new.message, "source: problem");
                self.ever.fetch_add(1, Ordering::Relaxed);
            }
            for old in now.iter().filter(|problem| !problems.contains(problem)) {
                tracing::info!(subject = old.subject, problem = old.message, "source: problem is gone");
            }
            let changed = !now.iter().eq(&problems);
            if changed {
                *now = problems.into_iter().collect();
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
    fn each_problem_counts_once_as_long_as_it_lasts() {
        let shared = Problems::default();
        let mut seen = shared.subscribe();
        shared.replace(problems(&["one", "two"]));
        assert!(seen.has_changed().unwrap());
        seen.mark_unchanged();
        shared.replace(problems(&["two", "one"]));
        assert!(!seen.has_changed().unwrap());
        assert_eq!(shared.ever(), 2);
        shared.replace(problems(&["two", "three"]));
        assert_eq!((shared.now().len(), shared.ever()), (2, 3));
        shared.replace(problems(&["one"]));
        assert_eq!((shared.now().len(), shared.ever()), (1, 4));
    }
}
