//! Who leads: the rules of a Lease as every Kubernetes component keeps them, without the requests.
//!
//! Pure. Times written into the Lease are for people: a candidate counts from when *it* saw the Lease change, so that
//! clocks of machines may differ (client-go's `leaderelection`). Knows no API server; [`super::election`] asks it what
//! to write.

use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;

/// How long leading lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// A leader that has not renewed for so long is replaced.
    pub duration: Duration,
    /// A leader that could not renew for so long leads no more: before anyone else begins.
    pub renew_deadline: Duration,
    /// Between two attempts.
    pub retry: Duration,
    /// A write of the leader is over, as far as it knows, after so long: before anyone else begins.
    pub patience: Duration,
}

impl Terms {
    /// In the proportions of client-go: 15, 10 and 2 seconds.
    pub fn new(duration: Duration) -> Self {
        Self { duration, renew_deadline: duration * 2 / 3, retry: duration * 2 / 15, patience: duration / 5 }
    }
}

/// What a Lease says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Empty: nobody.
    pub holder: String,
    pub duration_seconds: i32,
    pub acquired: Option<Timestamp>,
    pub renewed: Option<Timestamp>,
    /// How often it went from one holder to another.
    pub transitions: i32,
}

/// What to do about the Lease that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make or write it, so: who succeeds leads.
    Write(Record),
    /// Another one leads.
    Wait,
}

/// One who leads or would.
#[derive(Debug)]
pub struct Candidate {
    identity: String,
    terms: Terms,
    /// The Lease as it was last seen to change, and when.
    observed: Option<(Record, Instant)>,
}

impl Candidate {
    pub const fn new(identity: String, terms: Terms) -> Self {
        Self { identity, terms, observed: None }
    }

    /// Who holds the Lease as far as known.
    pub fn holder(&self) -> Option<&str> {
        self.observed.as_ref().map(|(record, _)| record.holder.as_str()).filter(|holder| !holder.is_empty())
    }

    pub fn leads(&self) -> bool {
        self.holder() == Some(self.identity.as_str())
    }

    /// The Lease is as given; `None`: there is none.
    pub fn see(&mut self, record: Option<&Record>, now: Instant) {
        match (record, &self.observed) {
            (None, _) => self.observed = None,
            (Some(record), Some((known, _))) if known == record => {}
            (Some(record), _) => self.observed = Some((record.clone(), now)),
        }
    }

    /// What to do now. `clock` is what this machine believes the time to be; it is written and never compared.
    pub fn step(&self, now: Instant, clock: Timestamp) -> Step {
        let mut next = Record {
            holder: self.identity.clone(),
            duration_seconds: self.terms.duration.as_secs() as i32,
            acquired: Some(clock),
            renewed: Some(clock),
            transitions: 0,
        };
        let Some((record, seen)) = &self.observed else { return Step::Write(next) };
        if self.leads() {
            next.acquired = record.acquired;
            next.transitions = record.transitions;
            return Step::Write(next);
        }
        let lasts = Duration::from_secs(record.duration_seconds.try_into().unwrap_or_default());
        if !record.holder.is_empty() && now < *seen + lasts {
            return Step::Wait;
        }
        next.transitions = record.transitions.saturating_add(1);
        Step::Write(next)
    }

    /// What to write when a leader ends: the next one need not wait. `None`: we do not lead.
    pub fn release(&self, clock: Timestamp) -> Option<Record> {
        let (record, _) = self.observed.as_ref().filter(|_| self.leads())?;
        // zero seconds are no valid duration
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
        Candidate::new(identity.to_owned(), Terms::new(SECOND * 15))
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
    fn who_finds_no_lease_makes_it_and_renews_it_as_it_was_acquired() {
        let (mut a, now) = (candidate("a"), Instant::now());
        let first = written(a.step(now, clock(100)));
        assert_eq!((first.holder.as_str(), first.transitions, first.duration_seconds), ("a", 0, 15));
        a.see(Some(&first), now);
        assert!(a.leads());
        let renewed = written(a.step(now + SECOND, clock(102)));
        assert_eq!((renewed.acquired, renewed.renewed), (Some(clock(100)), Some(clock(102))));
        assert_eq!(renewed.transitions, 0);
    }

    #[test]
    fn another_takes_over_fifteen_seconds_after_it_saw_the_last_renewal() {
        let (mut a, mut b, now) = (candidate("a"), candidate("b"), Instant::now());
        let record = written(a.step(now, clock(100)));
        a.see(Some(&record), now);
        b.see(Some(&record), now + SECOND);
        b.see(Some(&record), now + SECOND * 10);
        assert_eq!(b.step(now + SECOND * 15, clock(0)), Step::Wait);
        let taken = written(b.step(now + SECOND * 16, clock(116)));
        assert_eq!((taken.holder.as_str(), taken.transitions), ("b", 1));
        assert_eq!(taken.acquired, Some(clock(116)));
        a.see(Some(&taken), now + SECOND * 16);
        assert!(!a.leads());
    }

    #[test]
    fn clocks_that_differ_by_hours_change_nothing() {
        for skew in [-7_200, 7_200] {
            let (mut a, mut b, now) = (candidate("a"), candidate("b"), Instant::now());
            let mut record = written(a.step(now, clock(10_000 + skew)));
            for second in 0..30 {
                let now = now + SECOND * second;
                a.see(Some(&record), now);
                record = written(a.step(now, clock(10_000 + skew + i64::from(second))));
                b.see(Some(&record), now);
                assert_eq!(b.step(now, clock(10_000)), Step::Wait, "second {second}");
            }
        }
    }

    #[test]
    fn a_released_lease_is_taken_at_once() {
        let (mut a, mut b, now) = (candidate("a"), candidate("b"), Instant::now());
        let record = written(a.step(now, clock(100)));
        assert_eq!(a.release(clock(100)), None, "nothing was acquired yet");
        a.see(Some(&record), now);
        let released = a.release(clock(105)).unwrap();
        assert_eq!((released.holder.as_str(), released.duration_seconds), ("", 1));
        b.see(Some(&released), now);
        assert_eq!(written(b.step(now, clock(105))).transitions, 1);
    }
}
