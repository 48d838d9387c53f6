//! `BACKEND_GENERATIONS`: a stable number for every backend, and whether it still exists.
//!
//! A generation is odd while its number is somebody's, even while it is nobody's. So a number that an agent gave out but
//! did not live to take back is seen by the next one, and a flow to a backend that is gone is stale whatever comes after.

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use dataplane_common::abi::{Addr, BackendSlot, Port};

use crate::{
    datapath::table::{Table, TableError},
    reconcile::{backoff::WorkQueue, counted::Counted},
};

/// What has a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::reconcile) struct BackendKey {
    pub(in crate::reconcile) addr: Addr,
    pub(in crate::reconcile) port: Port,
    pub(in crate::reconcile) protocol: u8,
}

#[derive(Debug)]
struct Backend {
    key: BackendKey,
    /// Ranges it is in.
    ranges: u32,
}

/// The numbers given out.
#[derive(Debug)]
pub(in crate::reconcile) struct Backends {
    pub(in crate::reconcile) table: Counted<u32, u32>,
    /// What is in the table.
    generations: Vec<u32>,
    ids: HashMap<BackendKey, u32>,
    known: HashMap<u32, Backend>,
    /// Free numbers below `next`; from there on all are free.
    freed: BTreeSet<u32>,
    next: u32,
    /// Numbers that may have become nobody's.
    pub(in crate::reconcile) queue: WorkQueue<u32>,
}

const fn in_use(generation: u32) -> bool {
    generation & 1 == 1
}

impl Backends {
    pub(super) fn new(table: Box<dyn Table<u32, u32>>) -> Self {
        let table = Counted::new(table);
        Self {
            generations: vec![0; table.capacity() as usize],
            table,
            ids: HashMap::new(),
            known: HashMap::new(),
            freed: BTreeSet::new(),
            next: 0,
            queue: WorkQueue::default(),
        }
    }

    /// Reads the generations. The numbers come with [`Self::adopt_slots`].
    pub(super) fn adopt(&mut self) -> Result<(), TableError> {
        for (id, generation) in self.table.entries()? {
            if let Some(known) = self.generations.get_mut(id as usize) {
                *known = generation;
            }
        }
        Ok(())
    }

    /// Takes the numbers in a range for given. `None`, and nothing is taken: they contradict others or the generations.
    pub(super) fn adopt_slots(&mut self, slots: &[BackendSlot], protocol: u8) -> Option<Vec<u32>> {
        let mut new: HashMap<u32, BackendKey> = HashMap::new();
        let mut new_ids: HashMap<BackendKey, u32> = HashMap::new();
        for slot in slots {
            let key = BackendKey { addr: slot.addr, port: slot.port, protocol };
            let generation = self.generations.get(slot.id as usize).copied()?;
            let key_of_id = self.known.get(&slot.id).map(|backend| backend.key);
            let agrees = in_use(generation)
                && slot.generation == generation
                && slot.reserved == 0
                && key_of_id.is_none_or(|known| known == key)
                && self.ids.get(&key).is_none_or(|id| *id == slot.id)
                && *new.entry(slot.id).or_insert(key) == key
                && *new_ids.entry(key).or_insert(slot.id) == slot.id;
            if !agrees {
                return None;
            }
        }
        for (id, key) in new {
            self.known.entry(id).or_insert(Backend { key, ranges: 0 });
            self.ids.insert(key, id);
        }
        Some(slots.iter().map(|slot| slot.id).collect())
    }

    /// No more numbers are adopted: the others are free.
    pub(super) fn adopted(&mut self) {
        self.next = self.known.keys().max().map_or(0, |id| id + 1);
        self.freed = (0..self.next).filter(|id| !self.known.contains_key(id)).collect();
    }

    /// Numbers that an earlier agent gave out and that are nobody's.
    pub(super) fn sweep(&mut self) {
        for (id, generation) in (0..).zip(&self.generations) {
            if in_use(*generation) && !self.known.contains_key(&id) {
                self.queue.push(id);
            }
        }
    }

    /// The number of a backend, if it has one.
    pub(super) fn id(&self, key: &BackendKey) -> Option<u32> {
        self.ids.get(key).copied()
    }

    pub(super) fn key(&self, id: u32) -> Option<&BackendKey> {
        self.known.get(&id).map(|backend| &backend.key)
    }

    /// What stands in a slot of the backend.
    pub(super) fn slot(&self, id: u32) -> Option<BackendSlot> {
        let BackendKey { addr, port, .. } = *self.key(id)?;
        let generation = *self.generations.get(id as usize)?;
        Some(BackendSlot { addr, id, generation, port, reserved: 0 })
    }

    /// The number of a backend; it gets one if it has none, and loses it later unless a range holds it by then.
    pub(super) fn number(&mut self, key: BackendKey) -> Result<u32, TableError> {
        if let Some(id) = self.id(&key) {
            return Ok(id);
        }
        let id = self.freed.first().copied().unwrap_or(self.next);
        let Some(generation) = self.generations.get(id as usize) else {
            let (table, capacity) = (self.table.name(), self.table.capacity());
            return Err(TableError::Full { table, capacity });
        };
        self.set_generation(id, generation.wrapping_add(1) | 1)?;
        if !self.freed.remove(&id) {
            self.next = id + 1;
        }
        self.ids.insert(key, id);
        self.known.insert(id, Backend { key, ranges: 0 });
        self.queue.push(id);
        Ok(id)
    }

    /// A range holds these (each once).
    pub(super) fn hold(&mut self, ids: &[u32]) {
        for id in ids {
            if let Some(backend) = self.known.get_mut(id) {
                backend.ranges += 1;
            }
        }
    }

    /// A range no longer holds these.
    pub(super) fn release(&mut self, ids: &[u32]) {
        for id in ids {
            if let Some(backend) = self.known.get_mut(id) {
                backend.ranges -= 1;
                if backend.ranges == 0 {
                    self.queue.push(*id);
                }
            }
        }
    }

    /// Works on one number that is due. `false`: there is none.
    pub(super) fn work_one(&mut self, now: Instant) -> bool {
        let Some(id) = self.queue.pop(now) else { return false };
        match self.take_back(id) {
            Ok(()) => self.queue.settle(&id),
            Err(error) => self.queue.fail(id, error.to_string(), now),
        }
        true
    }

    /// If no range holds the number: what still uses it is stale from now on.
    fn take_back(&mut self, id: u32) -> Result<(), TableError> {
        let Some(generation) = self.generations.get(id as usize).copied() else { return Ok(()) };
        match self.known.get(&id) {
            Some(backend) if backend.ranges > 0 => {}
            Some(Backend { key, .. }) => {
                let key = *key;
                self.set_generation(id, generation.wrapping_add(1))?;
                self.known.remove(&id);
                self.ids.remove(&key);
                self.freed.insert(id);
            }
            None if in_use(generation) => self.set_generation(id, generation.wrapping_add(1))?,
            None => {}
        }
        Ok(())
    }

    /// Compares with the table, and repairs it. Returns how many generations differed.
    pub(in crate::reconcile) fn audit(&mut self) -> Result<u64, TableError> {
        let mut different = 0;
        for (id, generation) in self.table.entries()? {
            let Some(known) = self.generations.get(id as usize).copied() else { continue };
            if generation != known {
                different += 1;
                self.set_generation(id, known)?;
            }
        }
        Ok(different)
    }

    fn set_generation(&mut self, id: u32, generation: u32) -> Result<(), TableError> {
        self.table.insert(&id, &generation)?;
        self.generations[id as usize] = generation;
        Ok(())
    }

    /// Numbers given out.
    pub(in crate::reconcile) fn used(&self) -> usize {
        self.known.len()
    }
}
