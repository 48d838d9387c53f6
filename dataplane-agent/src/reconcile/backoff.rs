//! Which keys are to be worked on: those that changed, in that order, and those that failed, when their time has come.
//!
//! A key that fails waits longer each time, by itself: the others go on. Knows no table and no clock.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    hash::Hash,
    time::{Duration, Instant},
};

/// The first wait; each failure doubles it.
const FIRST: Duration = Duration::from_millis(100);
/// An empty queue keeps room for so many keys: the first list of a cluster leaves it much larger.
const ROOM: usize = 64;
/// No wait is longer.
const LONGEST: Duration = Duration::from_secs(30);

/// The work there is.
#[derive(Debug)]
pub struct WorkQueue<K> {
    changed: VecDeque<K>,
    queued: HashSet<K>,
    failures: HashMap<K, Failure>,
    waiting: BTreeSet<(Instant, K)>,
    random: u64,
    retries: u64,
}

#[derive(Debug)]
struct Failure {
    attempts: u32,
    due: Instant,
    message: String,
}

impl<K> Default for WorkQueue<K> {
    fn default() -> Self {
        Self {
            changed: VecDeque::new(),
            queued: HashSet::new(),
            failures: HashMap::new(),
            waiting: BTreeSet::new(),
            random: u64::from(std::process::id()) | 1 << 32,
            retries: 0,
        }
    }
}

impl<K: Clone + Ord + Hash> WorkQueue<K> {
    /// The key changed. One that waits after a failure is tried at once: what failed may not be wanted any more.
    pub fn push(&mut self, key: K) {
        if self.queued.insert(key.clone()) {
            self.changed.push_back(key);
        }
    }

    /// The next key to work on. Its outcome is told by [`Self::settle`] or [`Self::fail`].
    pub fn pop(&mut self, now: Instant) -> Option<K> {
        if let Some(key) = self.changed.pop_front() {
            self.queued.remove(&key);
            if self.changed.is_empty() {
                self.changed.shrink_to(ROOM);
                self.queued.shrink_to(ROOM);
            }
            return Some(key);
        }
        let (due, _) = self.waiting.first()?;
        if *due > now {
            return None;
        }
        let (_, key) = self.waiting.pop_first()?;
        self.retries += 1;
        Some(key)
    }

    /// The key is as it should be.
    pub fn settle(&mut self, key: &K) {
        if let Some(failure) = self.failures.remove(key) {
            self.waiting.remove(&(failure.due, key.clone()));
        }
    }

    /// The key is not as it should be: try again later.
    pub fn fail(&mut self, key: K, message: String, now: Instant) {
        let attempts = self.failures.get(&key).map_or(0, |failure| failure.attempts);
        let due = now + self.delay(attempts);
        self.wait(key, Failure { attempts: attempts + 1, due, message });
    }

    /// The key cannot be made right before `due`, and that is known: no failure that counts.
    pub fn postpone(&mut self, key: K, message: String, due: Instant) {
        let attempts = self.failures.get(&key).map_or(0, |failure| failure.attempts);
        self.wait(key, Failure { attempts, due, message });
    }

    fn wait(&mut self, key: K, failure: Failure) {
        self.settle(&key);
        self.waiting.insert((failure.due, key.clone()));
        self.failures.insert(key, failure);
    }

    /// Half of the delay is chance, so that keys that failed together do not come back together.
    fn delay(&mut self, attempts: u32) -> Duration {
        // xorshift64 (Marsaglia 2003)
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let longest = FIRST.saturating_mul(1_u32.checked_shl(attempts).unwrap_or(u32::MAX)).min(LONGEST);
        let half = longest / 2;
        half + Duration::from_nanos(self.random % half.as_nanos() as u64)
    }

    /// When there is something to do again: `None` if nothing waits.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        if self.changed.is_empty() { self.waiting.first().map(|(due, _)| *due) } else { Some(now) }
    }

    /// Nothing changed that has not been worked on, and nothing failed.
    pub fn is_settled(&self) -> bool {
        self.changed.is_empty() && self.failures.is_empty()
    }

    /// Keys that failed, with the last error.
    pub fn problems(&self) -> impl Iterator<Item = (&K, &str)> {
        let failed = self.failures.iter().filter(|(_, failure)| failure.attempts > 0);
        failed.map(|(key, failure)| (key, failure.message.as_str()))
    }

    /// How many keys failed.
    pub fn pending(&self) -> u64 {
        self.failures.len() as u64
    }

    /// Attempts made because an earlier one failed.
    pub fn retries(&self) -> u64 {
        self.retries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_fails_waits_longer_each_time_and_others_do_not() {
        let mut queue = WorkQueue::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        queue.push("bad");
        for _ in 0..12 {
            assert_eq!(queue.pop(now), Some("bad"));
            queue.fail("bad", "no".to_owned(), now);
            queue.push("good");
            assert_eq!(queue.pop(now), Some("good"));
            queue.settle(&"good");
            assert_eq!(queue.pop(now), None);
            let due = queue.next_due(now).unwrap();
            waits.push(due - now);
            now = due;
        }
        assert!(waits[0] >= FIRST / 2 && waits[0] <= FIRST, "{waits:?}");
        assert!(waits[5] > waits[2], "{waits:?}");
        assert!(waits.iter().all(|wait| *wait <= LONGEST), "{waits:?}");
        assert_eq!(queue.retries(), 11);
    }

    #[test]
    fn a_change_is_tried_at_once_and_success_forgets_the_failure() {
        let mut queue = WorkQueue::default();
        let now = Instant::now();
        queue.push(1);
        queue.pop(now);
        queue.fail(1, "no".to_owned(), now);
        queue.push(1);
        assert_eq!(queue.pop(now), Some(1));
        queue.settle(&1);
        assert!(queue.is_settled());
        assert_eq!(queue.next_due(now), None);
    }

    #[test]
    fn what_a_flood_of_keys_needed_is_given_back_when_all_are_worked_on() {
        let mut queue = WorkQueue::default();
        (0..10_000).for_each(|key| queue.push(key));
        let now = Instant::now();
        assert_eq!(std::iter::from_fn(|| queue.pop(now)).count(), 10_000);
        let room = (queue.changed.capacity(), queue.queued.capacity());
        assert!(room.0 <= 2 * ROOM && room.1 <= 2 * ROOM, "{room:?}");
    }

    #[test]
    fn a_key_that_changes_twice_is_worked_on_once() {
        let mut queue = WorkQueue::default();
        let now = Instant::now();
        queue.push('a');
        queue.push('b');
        queue.push('a');
        assert_eq!((queue.pop(now), queue.pop(now), queue.pop(now)), (Some('a'), Some('b'), None));
    }
}
