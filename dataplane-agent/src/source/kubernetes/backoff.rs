//! Exponential backoff with jitter after a failed request.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

/// Short, because a watch that ends once is usually restored at once.
const INITIAL: Duration = Duration::from_millis(100);
/// After an outage, every node is up to date again within this time.
const MAX: Duration = Duration::from_secs(10);

/// The backoff of one reflector.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// A request succeeded.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Consecutive failures.
    pub(super) const fn failures(&self) -> u32 {
        self.failures
    }

    /// Counts a failure and returns how long to wait.
    pub(super) fn next(&mut self) -> Duration {
        let base = INITIAL.saturating_mul(1 << self.failures.min(10)).min(MAX);
        self.failures += 1;
        let jitter = f64::from(RandomState::new().hash_one(self.failures) as u32) / f64::from(u32::MAX);
        base.mul_f64(0.5 + jitter / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_grows_to_maximum_and_resets() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(waits[0] <= INITIAL && waits[0] >= INITIAL / 2);
        assert!(waits.iter().all(|wait| *wait <= MAX));
        assert!(waits[20..].iter().all(|wait| *wait >= MAX / 2));
        assert!(waits[20..].iter().any(|wait| *wait != waits[39]), "jitter spreads agents");
        backoff.reset();
        assert!(backoff.next() <= INITIAL);
    }
}
