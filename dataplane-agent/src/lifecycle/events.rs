//! Events on the Node: ready, not ready, and problems, derived from the agent's status.
//!
//! [`event_recorder`](crate::event_recorder) writes them and limits their rate.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::sleep_until};

use super::condition::ReadinessTracker;
use crate::{
    api::views::{Origin, ProblemView, Status},
    event_recorder::{EventRecorder, EventType, NewEvent, node},
};

/// Shortest time between two evaluations of the status, which changes often.
const DEBOUNCE: Duration = Duration::from_secs(1);
/// A problem that persists is reported again after this time.
const REMINDER_INTERVAL: Duration = Duration::from_secs(1_800);
/// Most problems reported at once: one broken manifest may cause thousands.
const MAX_PROBLEMS: usize = 10;

/// Writes Events about the Node.
pub(super) struct Reporter {
    pub(super) recorder: EventRecorder,
    pub(super) name: String,
    pub(super) status: watch::Receiver<Status>,
    pub(super) uid: watch::Receiver<Option<String>>,
    pub(super) readiness: ReadinessTracker,
}

/// What was reported already.
#[derive(Default)]
struct Reported {
    /// The last reported state of the condition.
    unavailable: Option<bool>,
    problems: BTreeMap<(Origin, String, String), Instant>,
}

impl Reporter {
    /// Runs until the agent stops.
    pub(super) async fn run(mut self) {
        let mut reported = Reported::default();
        // an Event refers to the Node by its UID
        if self.uid.wait_for(Option::is_some).await.is_err() {
            return;
        }
        loop {
            let now = Instant::now();
            let status = self.status.borrow_and_update().clone();
            let uid = self.uid.borrow().clone().unwrap_or_default();
            let wanted = self.readiness.update(&status, now);
            for (event_type, reason, note) in reported.due(wanted.as_ref(), &status.problems, now) {
                let regarding = node(&self.name, &uid);
                let action = "ConnectPods";
                self.recorder.record(NewEvent { regarding, event_type, reason, action, note });
            }
            let reminder = now + REMINDER_INTERVAL;
            let grace = self.readiness.deadline().filter(|deadline| *deadline > now);
            let next = grace.map_or(reminder, |deadline| deadline.min(reminder));
            tokio::select! {
                changed = self.status.changed() => if changed.is_err() { return },
                () = sleep_until(next.into()) => {}
            }
            sleep_until((now + DEBOUNCE).into()).await;
        }
    }
}

impl Reported {
    /// The Events to write now.
    fn due(
        &mut self,
        wanted: Option<&super::condition::Wanted>,
        problems: &[ProblemView],
        now: Instant,
    ) -> Vec<(EventType, &'static str, String)> {
        let mut events = Vec::new();
        if let Some(wanted) = wanted
            && self.unavailable != Some(wanted.unavailable)
        {
            self.unavailable = Some(wanted.unavailable);
            let event_type = if wanted.unavailable { EventType::Warning } else { EventType::Normal };
            events.push((event_type, wanted.reason, wanted.message.clone()));
        }
        let key = |problem: &ProblemView| (problem.origin, problem.subject.clone(), problem.message.clone());
        let current: Vec<_> = problems.iter().map(key).collect();
        self.problems.retain(|reported, _| current.contains(reported));
        let due = problems.iter().filter(|problem| {
            self.problems.get(&key(problem)).is_none_or(|at| now.duration_since(*at) >= REMINDER_INTERVAL)
        });
        let due: Vec<_> = due.take(MAX_PROBLEMS).cloned().collect();
        for problem in due {
            events.push((
                EventType::Warning,
                reason(&problem),
                format!("{}: {}", problem.subject, problem.message),
            ));
            self.problems.insert(key(&problem), now);
        }
        events
    }
}

const fn reason(problem: &ProblemView) -> &'static str {
    match problem.origin {
        Origin::Source => "DataplaneObjectRejected",
        Origin::Reconcile => "DataplaneProgrammingFailed",
        Origin::Datapath => "DataplaneDegraded",
        Origin::Node => "DataplaneNodeProblem",
    }
}

#[cfg(test)]
mod tests {
    use super::{super::condition::Wanted, *};

    fn problem(message: &str) -> ProblemView {
        ProblemView { origin: Origin::Node, subject: "kube-proxy".to_owned(), message: message.to_owned() }
    }

    #[test]
    fn problem_is_reported_once_and_again_after_the_reminder_interval() {
        let (mut reported, now) = (Reported::default(), Instant::now());
        let ready = Wanted { unavailable: false, reason: "DataplaneReady", message: "good".to_owned() };
        let problems = [problem("runs")];
        let events = reported.due(Some(&ready), &problems, now);
        assert_eq!(events.len(), 2);
        assert_eq!(events[1], (EventType::Warning, "DataplaneNodeProblem", "kube-proxy: runs".to_owned()));
        assert_eq!(reported.due(Some(&ready), &problems, now + DEBOUNCE), []);
        assert_eq!(reported.due(Some(&ready), &problems, now + REMINDER_INTERVAL).len(), 1);
        assert_eq!(reported.due(Some(&ready), &[], now + REMINDER_INTERVAL), []);
        assert_eq!(reported.due(Some(&ready), &problems, now + REMINDER_INTERVAL).len(), 1, "it came back");
    }

    #[test]
    fn change_of_readiness_is_reported_once() {
        let (mut reported, now) = (Reported::default(), Instant::now());
        let wanted = |unavailable| Wanted { unavailable, reason: "R", message: "m".to_owned() };
        assert_eq!(reported.due(None, &[], now), []);
        assert_eq!(reported.due(Some(&wanted(true)), &[], now)[0].0, EventType::Warning);
        assert_eq!(reported.due(Some(&wanted(true)), &[], now), []);
        assert_eq!(reported.due(Some(&wanted(false)), &[], now)[0].0, EventType::Normal);
    }

    #[test]
    fn number_of_problems_reported_at_once_is_limited() {
        let (mut reported, now) = (Reported::default(), Instant::now());
        let problems: Vec<_> = (0..1_000).map(|number| problem(&number.to_string())).collect();
        assert_eq!(reported.due(None, &problems, now).len(), MAX_PROBLEMS);
    }
}
