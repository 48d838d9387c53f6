//! `BACKENDS`: the ranges of slots, which rows of `SERVICES` point into them, and what they hold.
//!
//! A range is written once, before anybody sees it, and never again until nobody has seen it for a while ([`Slots`]).

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

/// Why there is no range.
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
    /// Rows that point into it.
    rows: u32,
    /// Number of the backend in each slot, as it was written; empty: never known.
    content: Box<[u32]>,
    /// Nothing says that it is no longer as it was written.
    sound: bool,
}

impl Extent {
    /// Each number once, in their order.
    fn members(&self) -> Vec<u32> {
        let mut members = self.content.to_vec();
        members.sort_unstable();
        members.dedup();
        members
    }
}

/// Every range that is not free.
#[derive(Debug)]
pub(in crate::reconcile) struct Ranges {
    pub(in crate::reconcile) table: InstrumentedTable<u32, BackendSlot>,
    pub(in crate::reconcile) slots: Slots,
    /// By first slot. They do not overlap.
    extents: BTreeMap<u32, Extent>,
}

impl Ranges {
    pub(super) fn new(table: Box<dyn Table<u32, BackendSlot>>) -> Self {
        let table = InstrumentedTable::new(table);
        Self { slots: Slots::new(table.capacity()), table, extents: BTreeMap::new() }
    }

    /// Takes over what a row points to. Returns the first slots of the ranges it holds from now on, and whether it is
    /// one range that is the row's own; if not, the row holds everything it touches, so that nothing of it is given to
    /// others while a reader may follow the row there.
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
            self.hold(range.start);
            return Ok((vec![range.start], true));
        }
        if self.slots.reserve(range) {
            let content = self.read(range, protocol, backends)?;
            self.insert(range, content, backends);
            self.hold(range.start);
            return Ok((vec![range.start], true));
        }
        Ok((self.hold_all(range, backends), false))
    }

    fn read(
        &self,
        range: Range,
        protocol: u8,
        backends: &mut Backends,
    ) -> Result<Option<Vec<u32>>, TableError> {
        let mut slots = Vec::with_capacity(range.len as usize);
        for index in range.start..range.end() {
            slots.push(self.table.get(&index)?.unwrap_or_default());
        }
        backends.adopt_slots(&slots, protocol)
    }

    fn hold_all(&mut self, range: Range, backends: &mut Backends) -> Vec<u32> {
        let end = range.start.saturating_add(range.len).min(self.slots.capacity());
        let Some(len) = end.checked_sub(range.start) else { return Vec::new() };
        let window = Range { start: range.start, len };
        for free in self.slots.free_in(window) {
            self.slots.reserve(free);
            self.insert(free, None, backends);
        }
        let before = self.extents.range(..window.start).next_back();
        let touching: Vec<_> = before
            .into_iter()
            .chain(self.extents.range(window.start..window.end()))
            .filter(|(_, extent)| extent.range.end() > window.start)
            .map(|(start, _)| *start)
            .collect();
        for start in &touching {
            self.hold(*start);
        }
        touching
    }

    /// Writes backends into a range nobody sees, and returns its first slot. The caller points rows to it
    /// ([`Self::hold`]), and calls [`Self::discard`] if there is none.
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
                self.slots.give_back(range);
                return Err(error.into());
            }
        }
        self.insert(range, Some(content.to_vec()), backends);
        Ok(range.start)
    }

    fn insert(&mut self, range: Range, content: Option<Vec<u32>>, backends: &mut Backends) {
        let sound = content.is_some();
        let content = content.unwrap_or_default().into_boxed_slice();
        let extent = Extent { range, rows: 0, content, sound };
        backends.hold(&extent.members());
        self.extents.insert(range.start, extent);
    }

    /// A row points to the range.
    pub(super) fn hold(&mut self, start: u32) {
        if let Some(extent) = self.extents.get_mut(&start) {
            extent.rows += 1;
        }
    }

    /// A row no longer points to the range: after the last one it rests, and is free.
    pub(super) fn release(&mut self, start: u32, backends: &mut Backends, now: Instant) {
        let Some(extent) = self.extents.get_mut(&start) else { return };
        extent.rows -= 1;
        if extent.rows == 0
            && let Some(extent) = self.extents.remove(&start)
        {
            self.slots.retire(extent.range, now);
            backends.release(&extent.members());
        }
    }

    /// Gives back a range that no row ever pointed to.
    pub(super) fn discard(&mut self, start: u32, backends: &mut Backends) {
        if self.extents.get(&start).is_none_or(|extent| extent.rows > 0) {
            return;
        }
        if let Some(extent) = self.extents.remove(&start) {
            self.slots.give_back(extent.range);
            backends.release(&extent.members());
        }
    }

    /// Whether the range holds exactly these.
    pub(super) fn holds(&self, start: u32, content: &[u32]) -> bool {
        self.extents.get(&start).is_some_and(|extent| extent.sound && *extent.content == *content)
    }

    /// The backends in a range, each once.
    pub(super) fn members(&self, start: u32) -> Vec<u32> {
        self.extents.get(&start).map(Extent::members).unwrap_or_default()
    }

    /// What each slot in use should hold, as far as that is known.
    pub(super) fn contents(&self) -> impl Iterator<Item = (u32, &[u32])> {
        let sound = self.extents.iter().filter(|(_, extent)| extent.sound);
        sound.map(|(start, extent)| (*start, &*extent.content))
    }

    /// The content is not what it was written as: a row that points there is to be written anew.
    pub(super) fn distrust(&mut self, start: u32) {
        if let Some(extent) = self.extents.get_mut(&start) {
            extent.sound = false;
        }
    }
}
