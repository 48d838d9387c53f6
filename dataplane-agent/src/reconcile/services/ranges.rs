//! Manages `BACKENDS`: ranges of slots, their content, and the rows of `SERVICES` that use them.
//!
//! A range is written once, before it is visible, and not again until the quarantine after its last
//! use ends ([`Slots`]).

use std::{collections::BTreeMap, time::Instant};

use dataplane_common::abi::{BackendSlot, Service};

use super::backends::Backends;
use crate::{
    datapath::table::{Table, TableError},
    reconcile::{
        instrumented::InstrumentedTable,
        slots::{Range, Slots, SlotsError},
    },
};

/// Why a range could not be written.
#[derive(Debug, thiserror::Error)]
pub(super) enum RangeError {
    #[error(transparent)]
    Slots(#[from] SlotsError),
    #[error(transparent)]
    Table(#[from] TableError),
}

#[derive(Debug)]
struct Extent {
    range: Range,
    /// Number of rows that use it.
    rows: u32,
    /// Backend ID in each slot, as written; empty: unknown.
    content: Box<[u32]>,
    /// The content is as written, as far as known.
    intact: bool,
}

impl Extent {
    /// The IDs, sorted and unique.
    fn members(&self) -> Vec<u32> {
        let mut members = self.content.to_vec();
        members.sort_unstable();
        members.dedup();
        members
    }
}

/// All ranges that are not free.
#[derive(Debug)]
pub(in crate::reconcile) struct Ranges {
    pub(in crate::reconcile) table: InstrumentedTable<u32, BackendSlot>,
    pub(in crate::reconcile) slots: Slots,
    /// By first slot. Ranges do not overlap.
    extents: BTreeMap<u32, Extent>,
}

impl Ranges {
    pub(super) fn new(table: Box<dyn Table<u32, BackendSlot>>) -> Self {
        let table = InstrumentedTable::new(table);
        Self { slots: Slots::new(table.capacity()), table, extents: BTreeMap::new() }
    }

    /// Adopts the range of a row. Returns the first slots of the ranges the row uses from now on,
    /// and whether it is a single range of its own. Otherwise the row keeps everything it touches,
    /// so that no part is allocated to others while a reader may follow the row.
    pub(super) fn adopt(
        &mut self,
        row: &Service,
        protocol: u8,
        backends: &mut Backends,
    ) -> Result<(Vec<u32>, bool), TableError> {
        if row.count == 0 {
            return Ok((Vec::new(), true));
        }
        let range = Range { start: row.first_slot, len: row.count };
        if self.extents.get(&range.start).is_some_and(|extent| extent.range == range) {
            self.acquire(range.start);
            return Ok((vec![range.start], true));
        }
        if self.slots.reserve(range) {
            let content = self.read(range, row.id, protocol, backends)?;
            self.insert(range, content, backends);
            self.acquire(range.start);
            return Ok((vec![range.start], true));
        }
        Ok((self.acquire_overlapping(range, backends), false))
    }

    fn read(
        &self,
        range: Range,
        service: u32,
        protocol: u8,
        backends: &mut Backends,
    ) -> Result<Option<Vec<u32>>, TableError> {
        let mut slots = Vec::with_capacity(range.len as usize);
        for index in range.start..range.end() {
            slots.push(self.table.get(&index)?.unwrap_or_default());
        }
        backends.adopt_slots(&slots, service, protocol)
    }

    fn acquire_overlapping(&mut self, range: Range, backends: &mut Backends) -> Vec<u32> {
        let end = range.start.saturating_add(range.len).min(self.slots.capacity());
        let Some(len) = end.checked_sub(range.start) else { return Vec::new() };
        let window = Range { start: range.start, len };
        for free in self.slots.free_in(window) {
            self.slots.reserve(free);
            self.insert(free, None, backends);
        }
        let before = self.extents.range(..window.start).next_back();
        let overlapping: Vec<_> = before
            .into_iter()
            .chain(self.extents.range(window.start..window.end()))
            .filter(|(_, extent)| extent.range.end() > window.start)
            .map(|(start, _)| *start)
            .collect();
        for start in &overlapping {
            self.acquire(*start);
        }
        overlapping
    }

    /// Writes backends into a new range and returns its first slot. The caller lets rows use it
    /// ([`Self::acquire`]), or calls [`Self::discard`].
    pub(super) fn write(
        &mut self,
        content: &[u32],
        backends: &mut Backends,
        now: Instant,
    ) -> Result<u32, RangeError> {
        let range = self.slots.allocate(content.len() as u32, now)?;
        for (index, id) in (range.start..).zip(content) {
            let slot = backends.slot(*id).unwrap_or_default();
            if let Err(error) = self.table.insert(&index, &slot) {
                self.slots.release(range);
                return Err(error.into());
            }
        }
        self.insert(range, Some(content.to_vec()), backends);
        Ok(range.start)
    }

    fn insert(&mut self, range: Range, content: Option<Vec<u32>>, backends: &mut Backends) {
        let intact = content.is_some();
        let content = content.unwrap_or_default().into_boxed_slice();
        let extent = Extent { range, rows: 0, content, intact };
        backends.acquire(&extent.members());
        self.extents.insert(range.start, extent);
    }

    /// A row uses the range.
    pub(super) fn acquire(&mut self, start: u32) {
        if let Some(extent) = self.extents.get_mut(&start) {
            extent.rows += 1;
        }
    }

    /// A row no longer uses the range: after the last one it is quarantined.
    pub(super) fn release(&mut self, start: u32, backends: &mut Backends, now: Instant) {
        let Some(extent) = self.extents.get_mut(&start) else { return };
        extent.rows -= 1;
        if extent.rows == 0
            && let Some(extent) = self.extents.remove(&start)
        {
            self.slots.quarantine(extent.range, now);
            backends.release(&extent.members());
        }
    }

    /// Frees a range that no row used.
    pub(super) fn discard(&mut self, start: u32, backends: &mut Backends) {
        if self.extents.get(&start).is_none_or(|extent| extent.rows > 0) {
            return;
        }
        if let Some(extent) = self.extents.remove(&start) {
            self.slots.release(extent.range);
            backends.release(&extent.members());
        }
    }

    /// Whether the range has exactly this content.
    pub(super) fn has_content(&self, start: u32, content: &[u32]) -> bool {
        self.extents.get(&start).is_some_and(|extent| extent.intact && *extent.content == *content)
    }

    /// The backend IDs of a range, each once.
    pub(super) fn members(&self, start: u32) -> Vec<u32> {
        self.extents.get(&start).map(Extent::members).unwrap_or_default()
    }

    /// The content of each range, if known.
    pub(super) fn contents(&self) -> impl Iterator<Item = (u32, &[u32])> {
        let intact = self.extents.iter().filter(|(_, extent)| extent.intact);
        intact.map(|(start, extent)| (*start, &*extent.content))
    }

    /// Ends adoption: ranges with IDs that an earlier agent used for several services are
    /// rewritten.
    pub(super) fn finish_adoption(&mut self, backends: &Backends) {
        for extent in self.extents.values_mut() {
            extent.intact &= !extent.content.iter().any(|id| backends.is_shared(*id));
        }
    }

    /// Marks the content as changed by another program: rows that use it are rewritten.
    pub(super) fn invalidate(&mut self, start: u32) {
        if let Some(extent) = self.extents.get_mut(&start) {
            extent.intact = false;
        }
    }
}
