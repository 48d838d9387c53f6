//! Events on the Node: ready, not ready, and what is wrong.
//!
//! Owns what is worth one; how often one is written is [`announce`](crate::announce)'s. Learns everything from the agent's status.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::sleep_until};

use super::condition::Judge;
use crate::{
    announce::{Announcement, Announcer, Weight, node},
    api::views::{Origin, ProblemView, Status},
};

/// The status is looked at no more often: it changes with every object.
const SETTLES: Duration = Duration::from_secs(1);
/// What is still wrong is said again.
const REMIND: Duration = Duration::from_secs(1_800);
/// Problems said in one go. A broken manifest of a thousand objects is one problem to a reader.
const MOST: usize = 10;

/// Says things about the node.
pub(super) struct Reporter {
    pub(super) announcer: Announcer,
    pub(super) name: String,
    pub(super) status: watch::Receiver<Status>,
    pub(super) uid: watch::Receiver<Option<String>>,
    pub(super) judge: Judge,
}

/// What was said.
#[derive(Default)]
struct Said {
    /// The last of ready and not ready.
    unavailable: Option<bool>,
    problems: BTreeMap<(Origin, String, String), Instant>,
}

impl Reporter {
    /// For ever, or until the agent ends.
    pub(super) async fn run(mut self) {
        let mut said = Said::default();
        // an Event names the Node by its identity
        if self.uid.wait_for(Option::is_some).await.is_err() {
            return;
        }
        loop {
            let now = Instant::now();
            let status = self.status.borrow_and_update().clone();
            let uid = self.uid.borrow().clone().unwrap_or_default();
            let wanted = self.judge.judge(&status, now);
            for (weight, reason, note) in said.news(wanted.as_ref(), &status.problems, now) {
                let about = node(&self.name, &uid);
                self.announcer.announce(Announcement { about, weight, reason, action: "ConnectPods", note });
            }
            let next = now + REMIND;
            let next = self.judge.due().filter(|due| *due > now).map_or(next, |due| due.min(next));
            tokio::select! {
                changed = self.status.changed() => if changed.is_err() { return },
                () = sleep_until(next.into()) => {}
            }
            sleep_until((now + SETTLES).into()).await;
        }
    }
}

impl Said {
    /// What is to be said now.
    fn news(
        &mut self,
        wanted: Option<&super::condition::Wanted>,
        problems: &[ProblemView],
        now: Instant,
    ) -> Vec<(Weight, &'static str, String)> {
        let mut news = Vec::new();
        if let Some(wanted) = wanted
            && self.unavailable != Some(wanted.unavailable)
        {
            self.unavailable = Some(wanted.unavailable);
            let weight = if wanted.unavailable { Weight::Warning } else { Weight::Normal };
            news.push((weight, wanted.reason, wanted.message.clone()));
        }
        let key = |problem: &ProblemView| (problem.origin, problem.subject.clone(), problem.message.clone());
        let current: Vec<_> = problems.iter().map(key).collect();
        self.problems.retain(|known, _| current.contains(known));
        let due = problems.iter().filter(|problem| {
            self.problems.get(&key(problem)).is_none_or(|at| now.duration_since(*at) >= REMIND)
        });
        let due: Vec<_> = due.take(MOST).cloned().collect();
        for problem in due {
            news.push((
                Weight::Warning,
                reason(&problem),
                format!("{}: {}", problem.subject, problem.message),
            ));
            self.problems.insert(key(&problem), now);
        }
        news
    }
}

const fn reason(problem: &ProblemView) -> &'static str {
    match problem.origin {
        Origin::Source => "DataplaneObjectRefused",
        Origin::Reconcile => "DataplaneEntryFailed",
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
    fn what_is_new_is_said_once_and_again_after_a_while() {
        let (mut said, now) = (Said::default(), Instant::now());
        let ready = Wanted { unavailable: false, reason: "DataplaneReady", message: "good".to_owned() };
        let problems = [problem("runs")];
        let news = said.news(Some(&ready), &problems, now);
        assert_eq!(news.len(), 2);
        assert_eq!(news[1], (Weight::Warning, "DataplaneNodeProblem", "kube-proxy: runs".to_owned()));
        assert_eq!(said.news(Some(&ready), &problems, now + SETTLES), []);
        assert_eq!(said.news(Some(&ready), &problems, now + REMIND).len(), 1);
        assert_eq!(said.news(Some(&ready), &[], now + REMIND), []);
        assert_eq!(said.news(Some(&ready), &problems, now + REMIND).len(), 1, "it came back");
    }

    #[test]
    fn not_ready_is_said_when_it_is_serious_and_ready_when_it_is_over() {
        let (mut said, now) = (Said::default(), Instant::now());
        let wanted = |unavailable| Wanted { unavailable, reason: "R", message: "m".to_owned() };
        assert_eq!(said.news(None, &[], now), []);
        assert_eq!(said.news(Some(&wanted(true)), &[], now)[0].0, Weight::Warning);
        assert_eq!(said.news(Some(&wanted(true)), &[], now), []);
        assert_eq!(said.news(Some(&wanted(false)), &[], now)[0].0, Weight::Normal);
    }

    #[test]
    fn a_thousand_problems_are_a_few_events_at_a_time() {
        let (mut said, now) = (Said::default(), Instant::now());
        let problems: Vec<_> = (0..1_000).map(|number| problem(&number.to_string())).collect();
        assert_eq!(said.news(None, &problems, now).len(), MOST);
    }
}
