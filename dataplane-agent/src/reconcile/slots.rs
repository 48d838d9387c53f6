//! Allocates ranges of the array `BACKENDS`, with a quarantine for ranges that a reader may still
//! use.
//!
//! Best fit; adjacent free ranges are merged. A range that was visible is not allocated again
//! before the quarantine ends: a program that read the old row of `SERVICES` has ended by then.
//! Knows no table; the caller passes the time.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// Duration of the quarantine. Programs run for microseconds; this covers the worst observed
/// preemption. A new agent starts without quarantine: it starts later than any program runs.
pub const QUARANTINE: Duration = Duration::from_secs(1);

/// Slots `start..start + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    pub start: u32,
    pub len: u32,
}

/// Why a range cannot be allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotsError {
    #[error("table BACKENDS is full: {needed} slots needed, {free} of {capacity} free")]
    Full { needed: u32, free: u32, capacity: u32 },
    #[error(
        "table BACKENDS: {needed} slots are in quarantine for readers of replaced ranges; retrying shortly"
    )]
    Quarantined { needed: u32, until: Instant },
    #[error("table BACKENDS is fragmented: {needed} contiguous slots needed, {free} slots free")]
    Fragmented { needed: u32, free: u32 },
}

/// The allocator.
#[derive(Debug)]
pub struct Slots {
    capacity: u32,
    /// Free ranges: start → length. No two are adjacent.
    free: BTreeMap<u32, u32>,
    /// Free ranges by length.
    by_length: BTreeSet<(u32, u32)>,
    free_total: u32,
    /// Ranges in quarantine, oldest first.
    quarantined: VecDeque<(Instant, Range)>,
    quarantined_total: u32,
}

impl Range {
    pub const fn end(&self) -> u32 {
        self.start + self.len
    }
}

impl Slots {
    /// Creates an allocator with all slots free.
    pub fn new(capacity: u32) -> Self {
        let mut slots = Self {
            capacity,
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            free_total: 0,
            quarantined: VecDeque::new(),
            quarantined_total: 0,
        };
        slots.release(Range { start: 0, len: capacity });
        slots
    }

    /// Allocates a range that no reader uses.
    pub fn allocate(&mut self, len: u32, now: Instant) -> Result<Range, SlotsError> {
        self.end_quarantine(now);
        let Some((found, start)) = self.by_length.range((len, 0)..).next().copied() else {
            return Err(self.shortage(len));
        };
        self.remove_free(start, found);
        if found > len {
            self.insert_free(start + len, found - len);
        }
        Ok(Range { start, len })
    }

    fn shortage(&self, needed: u32) -> SlotsError {
        let free = self.free_total + self.quarantined_total;
        if free < needed {
            SlotsError::Full { needed, free, capacity: self.capacity }
        } else if let Some((since, _)) = self.quarantined.front() {
            SlotsError::Quarantined { needed, until: *since + QUARANTINE }
        } else {
            SlotsError::Fragmented { needed, free }
        }
    }

    /// Allocates this range (adoption). Returns `false`, and changes nothing, if not all of it is
    /// free.
    pub fn reserve(&mut self, range: Range) -> bool {
        let Some((start, len)) = self.free.range(..=range.start).next_back().map(|(s, l)| (*s, *l)) else {
            return false;
        };
        let Some(end) = range.start.checked_add(range.len) else { return false };
        if end > start + len {
            return false;
        }
        self.remove_free(start, len);
        if range.start > start {
            self.insert_free(start, range.start - start);
        }
        if end < start + len {
            self.insert_free(end, start + len - end);
        }
        true
    }

    /// Puts a range in quarantine: no row of `SERVICES` uses it since `now`.
    pub fn quarantine(&mut self, range: Range, now: Instant) {
        self.quarantined.push_back((now, range));
        self.quarantined_total += range.len;
    }

    /// Frees a range that was never visible.
    pub fn release(&mut self, range: Range) {
        if range.len == 0 {
            return;
        }
        let (mut start, mut len) = (range.start, range.len);
        let before = self.free.range(..start).next_back().map(|(s, l)| (*s, *l));
        if let Some((s, l)) = before
            && s + l == start
        {
            self.remove_free(s, l);
            (start, len) = (s, l + len);
        }
        if let Some(l) = self.free.get(&(start + len)).copied() {
            self.remove_free(start + len, l);
            len += l;
        }
        self.insert_free(start, len);
    }

    /// The free parts of `window`.
    pub fn free_in(&self, window: Range) -> Vec<Range> {
        let first = self.free.range(..window.start).next_back();
        let rest = self.free.range(window.start..window.end());
        let cut = |(start, len): (&u32, &u32)| {
            let (from, to) = ((*start).max(window.start), (start + len).min(window.end()));
            (from < to).then(|| Range { start: from, len: to - from })
        };
        first.into_iter().chain(rest).filter_map(cut).collect()
    }

    /// Slots in use, including quarantine.
    pub fn used(&self) -> u32 {
        self.capacity - self.free_total
    }

    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    fn end_quarantine(&mut self, now: Instant) {
        while let Some((since, range)) = self.quarantined.front().copied()
            && now.saturating_duration_since(since) >= QUARANTINE
        {
            self.quarantined.pop_front();
            self.quarantined_total -= range.len;
            self.release(range);
        }
    }

    fn insert_free(&mut self, start: u32, len: u32) {
        self.free.insert(start, len);
        self.by_length.insert((len, start));
        self.free_total += len;
    }

    fn remove_free(&mut self, start: u32, len: u32) {
        self.free.remove(&start);
        self.by_length.remove(&(len, start));
        self.free_total -= len;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn overlaps(a: Range, b: Range) -> bool {
        a.start < b.end() && b.start < a.end()
    }

    proptest! {
        /// Allocations never overlap each other or a quarantined range, and all freed ranges are
        /// merged.
        #[test]
        fn ranges_never_overlap(steps in proptest::collection::vec((0_u8..4, 1_u32..20, 0_u64..600), 1..200)) {
            let mut now = Instant::now();
            let mut slots = Slots::new(100);
            let mut live: Vec<Range> = Vec::new();
            let mut quarantined: Vec<(Instant, Range)> = Vec::new();
            for (step, len, millis) in steps {
                now += Duration::from_millis(millis);
                quarantined.retain(|(since, _)| now - *since < QUARANTINE);
                if step < 2 {
                    if let Ok(range) = slots.allocate(len, now) {
                        prop_assert!(range.len == len && range.end() <= 100);
                        prop_assert!(live.iter().all(|other| !overlaps(*other, range)));
                        prop_assert!(quarantined.iter().all(|(_, other)| !overlaps(*other, range)));
                        live.push(range);
                    }
                } else if !live.is_empty() {
                    let range = live.swap_remove(len as usize % live.len());
                    if step == 2 {
                        slots.quarantine(range, now);
                        quarantined.push((now, range));
                    } else {
                        slots.release(range);
                    }
                }
            }
            for range in live {
                slots.release(range);
            }
            slots.end_quarantine(now + QUARANTINE);
            prop_assert_eq!(slots.allocate(100, now).unwrap(), Range { start: 0, len: 100 });
        }
    }

    #[test]
    fn error_names_cause_of_shortage() {
        let now = Instant::now();
        let mut slots = Slots::new(10);
        let ranges: Vec<_> = (0..5).map(|_| slots.allocate(2, now).unwrap()).collect();
        assert!(matches!(slots.allocate(1, now), Err(SlotsError::Full { needed: 1, free: 0, capacity: 10 })));
        slots.quarantine(ranges[0], now);
        assert_eq!(
            slots.allocate(1, now),
            Err(SlotsError::Quarantined { needed: 1, until: now + QUARANTINE })
        );
        slots.release(ranges[2]);
        let later = now + QUARANTINE;
        slots.end_quarantine(later);
        assert!(matches!(slots.allocate(4, later), Err(SlotsError::Fragmented { needed: 4, free: 4 })));
    }

    #[test]
    fn reserved_range_is_not_allocated_or_reserved_again() {
        let now = Instant::now();
        let mut slots = Slots::new(10);
        assert!(slots.reserve(Range { start: 3, len: 4 }));
        assert!(!slots.reserve(Range { start: 6, len: 1 }));
        assert!(!slots.reserve(Range { start: 9, len: 2 }));
        assert!(!slots.reserve(Range { start: 9, len: u32::MAX }));
        assert_eq!(slots.allocate(3, now), Ok(Range { start: 0, len: 3 }));
        assert_eq!(slots.allocate(3, now), Ok(Range { start: 7, len: 3 }));
    }
}
