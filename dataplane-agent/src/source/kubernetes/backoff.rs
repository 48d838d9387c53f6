//! How long to wait after a failure: longer each time, partly by chance, so that agents do not come back together.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// After a first failure: a watch that breaks off is followed by another before anyone notices.
const FIRST: Duration = Duration::from_millis(100);
/// No wait is longer: after an outage, every node is up to date again within this time.
const LONGEST: Duration = Duration::from_secs(10);

/// Waits between attempts.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// It works again.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures in a row.
    pub(super) const fn failures(&self) -> u32 {
        self.failures
    }

    /// One more failure: how long to wait.
    pub(super) fn next(&mut self) -> Duration {
        let longest = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures += 1;
        let chance = f64::from(RandomState::new().hash_one(self.failures) as u32) / f64::from(u32::MAX);
        longest.mul_f64(0.5 + chance / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_start_again() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(waits[0] <= FIRST && waits[0] >= FIRST / 2);
        assert!(waits.iter().all(|wait| *wait <= LONGEST));
        assert!(waits[20..].iter().all(|wait| *wait >= LONGEST / 2));
        assert!(waits[20..].iter().any(|wait| *wait != waits[39]), "chance keeps agents apart");
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
