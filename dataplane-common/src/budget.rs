//! A rate limit with a burst, in one number (the generic cell rate algorithm).

/// How much may be spent.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Nanoseconds from one to the next.
    interval: u64,
    /// Nanoseconds that the next may be ahead of its time.
    tolerance: u64,
}

impl Budget {
    /// So many a second, and so many at once after a pause.
    pub const fn per_second(rate: u64, burst: u64) -> Self {
        let interval = 1_000_000_000 / rate;
        Self { interval, tolerance: interval * (burst - 1) }
    }

    /// Spends one at the time `now`, in nanoseconds. `due` is what the previous call returned, at
    /// first 0. `None` if the budget is used up.
    #[inline(always)]
    pub const fn spend(self, due: u64, now: u64) -> Option<u64> {
        let due = if due > now { due } else { now };
        if due - now > self.tolerance { None } else { Some(due + self.interval) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// How many of `tries` at this time are within the budget.
    fn spend(budget: Budget, due: &mut u64, now: u64, tries: usize) -> usize {
        let mut spent = 0;
        for _ in 0..tries {
            if let Some(next) = budget.spend(*due, now) {
                *due = next;
                spent += 1;
            }
        }
        spent
    }

    #[test]
    fn burst_is_spent_at_once_and_refills_at_the_rate() {
        let budget = Budget::per_second(1, 6);
        let mut due = 0;
        assert_eq!(spend(budget, &mut due, 100 * SECOND, 20), 6);
        assert_eq!(spend(budget, &mut due, 101 * SECOND, 20), 1);
        assert_eq!(spend(budget, &mut due, 104 * SECOND, 20), 3);
        assert_eq!(spend(budget, &mut due, 999 * SECOND, 20), 6, "no more than the burst");
    }
}
