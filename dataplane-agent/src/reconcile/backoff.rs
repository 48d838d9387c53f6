//! A work queue of keys: changed keys in order, and failed keys after their backoff.
//!
//! Each key has its own exponential backoff; other keys go on. Knows no table and no clock.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    hash::Hash,
    time::{Duration, Instant},
};

/// First delay; each failure doubles it.
const INITIAL_DELAY: Duration = Duration::from_millis(100);
/// Capacity an empty queue keeps: the first list of a cluster grows it far beyond.
const IDLE_CAPACITY: usize = 64;
/// Maximum delay.
const MAX_DELAY: Duration = Duration::from_secs(30);

/// Keys to work on.
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
    /// Adds a changed key. A key in backoff is tried at once, because its desired state may have
    /// changed.
    pub fn push(&mut self, key: K) {
        if self.queued.insert(key.clone()) {
            self.changed.push_back(key);
        }
    }

    /// Returns the next key. The caller reports the outcome by [`Self::done`] or [`Self::fail`].
    pub fn pop(&mut self, now: Instant) -> Option<K> {
        if let Some(key) = self.changed.pop_front() {
            self.queued.remove(&key);
            if self.changed.is_empty() {
                self.changed.shrink_to(IDLE_CAPACITY);
                self.queued.shrink_to(IDLE_CAPACITY);
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

    /// Marks a key as done.
    pub fn done(&mut self, key: &K) {
        if let Some(failure) = self.failures.remove(key) {
            self.waiting.remove(&(failure.due, key.clone()));
        }
    }

    /// Marks a key as failed: it is tried again after its backoff.
    pub fn fail(&mut self, key: K, message: String, now: Instant) {
        let attempts = self.failures.get(&key).map_or(0, |failure| failure.attempts);
        let due = now + self.delay(attempts);
        self.schedule(key, Failure { attempts: attempts + 1, due, message });
    }

    /// Delays a key until `due` without counting a failure.
    pub fn postpone(&mut self, key: K, message: String, due: Instant) {
        let attempts = self.failures.get(&key).map_or(0, |failure| failure.attempts);
        self.schedule(key, Failure { attempts, due, message });
    }

    fn schedule(&mut self, key: K, failure: Failure) {
        self.done(&key);
        self.waiting.insert((failure.due, key.clone()));
        self.failures.insert(key, failure);
    }

    /// Exponential delay with jitter, so that keys that failed together are not retried together.
    fn delay(&mut self, attempts: u32) -> Duration {
        // xorshift64 (Marsaglia 2003)
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let base =
            INITIAL_DELAY.saturating_mul(1_u32.checked_shl(attempts).unwrap_or(u32::MAX)).min(MAX_DELAY);
        let half = base / 2;
        half + Duration::from_nanos(self.random % half.as_nanos() as u64)
    }

    /// When the next key is due; `None` if the queue is empty.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        if self.changed.is_empty() { self.waiting.first().map(|(due, _)| *due) } else { Some(now) }
    }

    /// Whether no key is queued or failed.
    pub fn is_settled(&self) -> bool {
        self.changed.is_empty() && self.failures.is_empty()
    }

    /// Failed keys with their last error.
    pub fn problems(&self) -> impl Iterator<Item = (&K, &str)> {
        let failed = self.failures.iter().filter(|(_, failure)| failure.attempts > 0);
        failed.map(|(key, failure)| (key, failure.message.as_str()))
    }

    /// Number of failed or delayed keys.
    pub fn pending(&self) -> u64 {
        self.failures.len() as u64
    }

    /// Number of retries.
    pub fn retries(&self) -> u64 {
        self.retries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_key_backs_off_exponentially_without_delaying_others() {
        let mut queue = WorkQueue::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        queue.push("bad");
        for _ in 0..12 {
            assert_eq!(queue.pop(now), Some("bad"));
            queue.fail("bad", "no".to_owned(), now);
            queue.push("good");
            assert_eq!(queue.pop(now), Some("good"));
            queue.done(&"good");
            assert_eq!(queue.pop(now), None);
            let due = queue.next_due(now).unwrap();
            waits.push(due - now);
            now = due;
        }
        assert!(waits[0] >= INITIAL_DELAY / 2 && waits[0] <= INITIAL_DELAY, "{waits:?}");
        assert!(waits[5] > waits[2], "{waits:?}");
        assert!(waits.iter().all(|schedule| *schedule <= MAX_DELAY), "{waits:?}");
        assert_eq!(queue.retries(), 11);
    }

    #[test]
    fn changed_key_is_retried_at_once_and_success_resets_backoff() {
        let mut queue = WorkQueue::default();
        let now = Instant::now();
        queue.push(1);
        queue.pop(now);
        queue.fail(1, "no".to_owned(), now);
        queue.push(1);
        assert_eq!(queue.pop(now), Some(1));
        queue.done(&1);
        assert!(queue.is_settled());
        assert_eq!(queue.next_due(now), None);
    }

    #[test]
    fn empty_queue_releases_capacity() {
        let mut queue = WorkQueue::default();
        (0..10_000).for_each(|key| queue.push(key));
        let now = Instant::now();
        assert_eq!(std::iter::from_fn(|| queue.pop(now)).count(), 10_000);
        let capacity = (queue.changed.capacity(), queue.queued.capacity());
        assert!(capacity.0 <= 2 * IDLE_CAPACITY && capacity.1 <= 2 * IDLE_CAPACITY, "{capacity:?}");
    }

    #[test]
    fn queued_key_is_not_queued_twice() {
        let mut queue = WorkQueue::default();
        let now = Instant::now();
        queue.push('a');
        queue.push('b');
        queue.push('a');
        assert_eq!((queue.pop(now), queue.pop(now), queue.pop(now)), (Some('a'), Some('b'), None));
    }
}
