//! The rules of leader election by a Lease, as in all Kubernetes components, without requests.
//!
//! Pure. Times in the Lease are informational: a candidate measures from when *it* observed the
//! Lease change, so that clocks may differ (client-go's `leaderelection`). [`super::election`]
//! sends the requests.

use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;

/// The timing of an election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTiming {
    /// A leader that has not renewed the Lease for this long is replaced.
    pub duration: Duration,
    /// A leader that could not renew for this long stops leading, before another one starts.
    pub renew_deadline: Duration,
    /// Delay between two attempts.
    pub retry_period: Duration,
    /// Timeout of a leader's write: it ends before another leader starts.
    pub request_timeout: Duration,
}

impl LeaseTiming {
    /// In the proportions of client-go: 15, 10 and 2 seconds.
    pub fn new(duration: Duration) -> Self {
        Self {
            duration,
            renew_deadline: duration * 2 / 3,
            retry_period: duration * 2 / 15,
            request_timeout: duration / 5,
        }
    }
}

/// The content of a Lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Empty: no holder.
    pub holder: String,
    pub duration_seconds: i32,
    pub acquired: Option<Timestamp>,
    pub renewed: Option<Timestamp>,
    /// Number of changes of the holder.
    pub transitions: i32,
}

/// What to do with the observed Lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Create or update it with this content: the writer that succeeds leads.
    Write(Record),
    /// Another candidate leads.
    Wait,
}

/// A leader or candidate.
#[derive(Debug)]
pub struct Candidate {
    identity: String,
    timing: LeaseTiming,
    /// The Lease at its last observed change, and when.
    observed: Option<(Record, Instant)>,
}

impl Candidate {
    pub const fn new(identity: String, timing: LeaseTiming) -> Self {
        Self { identity, timing, observed: None }
    }

    /// The observed holder of the Lease.
    pub fn holder(&self) -> Option<&str> {
        self.observed.as_ref().map(|(record, _)| record.holder.as_str()).filter(|holder| !holder.is_empty())
    }

    pub fn is_leader(&self) -> bool {
        self.holder() == Some(self.identity.as_str())
    }

    /// Records the observed Lease; `None`: it does not exist.
    pub fn observe(&mut self, record: Option<&Record>, now: Instant) {
        match (record, &self.observed) {
            (None, _) => self.observed = None,
            (Some(record), Some((known, _))) if known == record => {}
            (Some(record), _) => self.observed = Some((record.clone(), now)),
        }
    }

    /// What to do now. `clock` is the wall clock: it is written but never compared.
    pub fn step(&self, now: Instant, clock: Timestamp) -> Step {
        let mut next = Record {
            holder: self.identity.clone(),
            duration_seconds: self.timing.duration.as_secs() as i32,
            acquired: Some(clock),
            renewed: Some(clock),
            transitions: 0,
        };
        let Some((record, observed_at)) = &self.observed else { return Step::Write(next) };
        if self.is_leader() {
            next.acquired = record.acquired;
            next.transitions = record.transitions;
            return Step::Write(next);
        }
        let duration = Duration::from_secs(record.duration_seconds.try_into().unwrap_or_default());
        if !record.holder.is_empty() && now < *observed_at + duration {
            return Step::Wait;
        }
        next.transitions = record.transitions.saturating_add(1);
        Step::Write(next)
    }

    /// What to write when a leader stops, so that the next need not wait. `None`: not the leader.
    pub fn release(&self, clock: Timestamp) -> Option<Record> {
        let (record, _) = self.observed.as_ref().filter(|_| self.is_leader())?;
        // the API rejects a duration of 0
        Some(Record {
            holder: String::new(),
            duration_seconds: 1,
            acquired: Some(clock),
            renewed: Some(clock),
            transitions: record.transitions,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn candidate(identity: &str) -> Candidate {
        Candidate::new(identity.to_owned(), LeaseTiming::new(SECOND * 15))
    }

    fn clock(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn written(step: Step) -> Record {
        match step {
            Step::Write(record) => record,
            Step::Wait => panic!("waits"),
        }
    }

    #[test]
    fn candidate_creates_missing_lease_and_renews_it() {
        let (mut a, now) = (candidate("a"), Instant::now());
        let first = written(a.step(now, clock(100)));
        assert_eq!((first.holder.as_str(), first.transitions, first.duration_seconds), ("a", 0, 15));
        a.observe(Some(&first), now);
        assert!(a.is_leader());
        let renewed = written(a.step(now + SECOND, clock(102)));
        assert_eq!((renewed.acquired, renewed.renewed), (Some(clock(100)), Some(clock(102))));
        assert_eq!(renewed.transitions, 0);
    }

    #[test]
    fn candidate_takes_over_lease_duration_after_last_observed_renewal() {
        let (mut a, mut b, now) = (candidate("a"), candidate("b"), Instant::now());
        let record = written(a.step(now, clock(100)));
        a.observe(Some(&record), now);
        b.observe(Some(&record), now + SECOND);
        b.observe(Some(&record), now + SECOND * 10);
        assert_eq!(b.step(now + SECOND * 15, clock(0)), Step::Wait);
        let taken = written(b.step(now + SECOND * 16, clock(116)));
        assert_eq!((taken.holder.as_str(), taken.transitions), ("b", 1));
        assert_eq!(taken.acquired, Some(clock(116)));
        a.observe(Some(&taken), now + SECOND * 16);
        assert!(!a.is_leader());
    }

    #[test]
    fn clock_skew_has_no_effect() {
        for skew in [-7_200, 7_200] {
            let (mut a, mut b, now) = (candidate("a"), candidate("b"), Instant::now());
            let mut record = written(a.step(now, clock(10_000 + skew)));
            for second in 0..30 {
                let now = now + SECOND * second;
                a.observe(Some(&record), now);
                record = written(a.step(now, clock(10_000 + skew + i64::from(second))));
                b.observe(Some(&record), now);
                assert_eq!(b.step(now, clock(10_000)), Step::Wait, "second {second}");
            }
        }
    }

    #[test]
    fn released_lease_is_acquired_at_once() {
        let (mut a, mut b, now) = (candidate("a"), candidate("b"), Instant::now());
        let record = written(a.step(now, clock(100)));
        assert_eq!(a.release(clock(100)), None, "nothing was acquired yet");
        a.observe(Some(&record), now);
        let released = a.release(clock(105)).unwrap();
        assert_eq!((released.holder.as_str(), released.duration_seconds), ("", 1));
        b.observe(Some(&released), now);
        assert_eq!(written(b.step(now, clock(105))).transitions, 1);
    }
}
