//! `BACKEND_GENERATIONS`: a stable number for every backend, and whether it still exists.
//!
//! A generation is odd while its number is somebody's, even while it is nobody's. So a number that an agent gave out but
//! did not live to take back is seen by the next one, and a flow to a backend that is gone is stale whatever comes after.

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use dataplane_common::abi::{Addr, BackendSlot, Port};

use super::numbers::Numbers;
use crate::{
    datapath::table::{Table, TableError},
    reconcile::{
        backoff::WorkQueue,
        instrumented::InstrumentedTable,
        sockets::{SocketUpdate, UdpBackend},
    },
    state::TransportProtocol,
};

/// What has a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::reconcile) struct BackendKey {
    pub(in crate::reconcile) addr: Addr,
    pub(in crate::reconcile) port: Port,
    pub(in crate::reconcile) protocol: u8,
}

impl BackendKey {
    /// Where sockets may be connected to that nobody asks again.
    fn udp(&self) -> Option<UdpBackend> {
        let is_udp = self.protocol == TransportProtocol::Udp.number();
        is_udp.then_some(UdpBackend { addr: self.addr, port: self.port })
    }
}

#[derive(Debug)]
pub(super) struct Backend {
    pub(super) key: BackendKey,
    /// What is in the table.
    pub(super) generation: u32,
    /// Ranges it is in.
    pub(super) ranges: u32,
}

/// The numbers given out.
#[derive(Debug)]
pub(in crate::reconcile) struct Backends {
    pub(in crate::reconcile) table: InstrumentedTable<u32, u32>,
    known: Numbers,
    /// Free numbers below `next`; from there on all are free.
    freed: BTreeSet<u32>,
    next: u32,
    /// The next number an earlier agent may have given out for nothing; `None`: all have been looked at.
    unseen: Option<u32>,
    /// Backends that serve: their numbers stay, though new connections may not get them. By how many services.
    kept: HashMap<BackendKey, u32>,
    /// UDP backends that got or lost their number.
    moved: Vec<SocketUpdate>,
    /// Numbers that may have become nobody's.
    pub(in crate::reconcile) queue: WorkQueue<u32>,
}

/// Numbers looked at in one step of the search for those of an earlier agent.
const LOOK_AT: u32 = 2_048;

const fn in_use(generation: u32) -> bool {
    generation & 1 == 1
}

impl Backends {
    pub(super) fn new(table: Box<dyn Table<u32, u32>>) -> Self {
        Self {
            table: InstrumentedTable::new(table),
            known: Numbers::default(),
            freed: BTreeSet::new(),
            next: 0,
            unseen: None,
            kept: HashMap::new(),
            moved: Vec::new(),
            queue: WorkQueue::default(),
        }
    }

    /// Takes the numbers in a range for given. `None`, and nothing is taken: they contradict others or the generations.
    pub(super) fn adopt_slots(
        &mut self,
        slots: &[BackendSlot],
        protocol: u8,
    ) -> Result<Option<Vec<u32>>, TableError> {
        let mut new: HashMap<u32, Backend> = HashMap::new();
        let mut new_ids: HashMap<BackendKey, u32> = HashMap::new();
        for slot in slots {
            let key = BackendKey { addr: slot.addr, port: slot.port, protocol };
            let generation = match self.known.get(slot.id).or_else(|| new.get(&slot.id)) {
                Some(backend) if backend.key == key => backend.generation,
                Some(_) => return Ok(None),
                None => match self.table.get(&slot.id)? {
                    Some(generation) => generation,
                    None => return Ok(None),
                },
            };
            let agrees = in_use(generation)
                && slot.generation == generation
                && slot.reserved == 0
                && self.id(&key).is_none_or(|id| id == slot.id)
                && *new_ids.entry(key).or_insert(slot.id) == slot.id;
            if !agrees {
                return Ok(None);
            }
            new.insert(slot.id, Backend { key, generation, ranges: 0 });
        }
        for (id, backend) in new {
            if self.known.get(id).is_none() {
                self.known.insert(id, backend);
            }
        }
        Ok(Some(slots.iter().map(|slot| slot.id).collect()))
    }

    /// No more numbers are adopted: the others are free.
    pub(super) fn adopted(&mut self) {
        self.next = self.known.iter().last().map_or(0, |(id, _)| id + 1);
        self.freed = (0..self.next).filter(|id| self.known.get(*id).is_none()).collect();
    }

    /// Begins to look for numbers that an earlier agent gave out and that are nobody's.
    pub(super) const fn sweep(&mut self) {
        self.unseen = Some(0);
    }

    /// Looks at some more. There may be many, and reading each costs a system call: nobody waits for it.
    pub(super) fn look(&mut self) {
        let Some(first) = self.unseen else { return };
        let last = first.saturating_add(LOOK_AT).min(self.table.capacity());
        for id in first..last {
            if self.known.get(id).is_some() {
                continue;
            }
            // what cannot be read is looked at again by whoever takes the number
            if self.table.get(&id).is_ok_and(|generation| generation.is_some_and(in_use)) {
                self.queue.push(id);
            }
        }
        self.unseen = (last < self.table.capacity()).then_some(last);
    }

    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        if self.unseen.is_some() { Some(now) } else { self.queue.next_due(now) }
    }

    /// The number of a backend, if it has one.
    pub(super) fn id(&self, key: &BackendKey) -> Option<u32> {
        self.known.find(key)
    }

    pub(super) fn key(&self, id: u32) -> Option<&BackendKey> {
        self.known.get(id).map(|backend| &backend.key)
    }

    /// What stands in a slot of the backend.
    pub(super) fn slot(&self, id: u32) -> Option<BackendSlot> {
        let Backend { key, generation, .. } = self.known.get(id)?;
        Some(BackendSlot { addr: key.addr, id, generation: *generation, port: key.port, reserved: 0 })
    }

    /// The number of a backend; it gets one if it has none, and loses it later unless a range holds it by then.
    pub(super) fn number(&mut self, key: BackendKey) -> Result<u32, TableError> {
        if let Some(id) = self.id(&key) {
            return Ok(id);
        }
        let id = self.freed.first().copied().unwrap_or(self.next);
        let Some(generation) = self.table.get(&id)? else {
            let (table, capacity) = (self.table.name(), self.table.capacity());
            return Err(TableError::Full { table, capacity });
        };
        let generation = generation.wrapping_add(1) | 1;
        self.table.insert(&id, &generation)?;
        if !self.freed.remove(&id) {
            self.next = id + 1;
        }
        self.moved.extend(key.udp().map(SocketUpdate::Back));
        self.known.insert(id, Backend { key, generation, ranges: 0 });
        self.queue.push(id);
        Ok(id)
    }

    /// A range holds these (each once).
    pub(super) fn hold(&mut self, ids: &[u32]) {
        for id in ids {
            if let Some(backend) = self.known.get_mut(*id) {
                backend.ranges += 1;
            }
        }
    }

    /// A range no longer holds these.
    pub(super) fn release(&mut self, ids: &[u32]) {
        for id in ids {
            if let Some(backend) = self.known.get_mut(*id) {
                backend.ranges -= 1;
                if backend.ranges == 0 {
                    self.queue.push(*id);
                }
            }
        }
    }

    /// One more service has these among those that serve.
    pub(super) fn keep<'a>(&mut self, keys: impl Iterator<Item = &'a BackendKey>) {
        for key in keys {
            *self.kept.entry(*key).or_default() += 1;
        }
    }

    /// A service has these no longer.
    pub(super) fn let_go<'a>(&mut self, keys: impl Iterator<Item = &'a BackendKey>) {
        for key in keys {
            let Some(services) = self.kept.get_mut(key) else { continue };
            *services -= 1;
            if *services == 0 {
                self.kept.remove(key);
                if let Some(id) = self.id(key) {
                    self.queue.push(id);
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

    /// If no range holds the number, and it is of nobody who serves: what still uses it is stale from now on.
    fn take_back(&mut self, id: u32) -> Result<(), TableError> {
        match self.known.get(id) {
            Some(backend) if backend.ranges > 0 || self.kept.contains_key(&backend.key) => {}
            Some(Backend { key, generation, .. }) => {
                self.table.insert(&id, &generation.wrapping_add(1))?;
                self.moved.extend(key.udp().map(SocketUpdate::Gone));
                self.known.remove(id);
                self.freed.insert(id);
            }
            None => {
                if let Some(generation) = self.table.get(&id)?.filter(|generation| in_use(*generation)) {
                    self.table.insert(&id, &generation.wrapping_add(1))?;
                }
            }
        }
        Ok(())
    }

    /// Compares the numbers given out with the table, and repairs it. Returns how many differed.
    pub(in crate::reconcile) fn audit(&mut self) -> Result<u64, TableError> {
        let mut different = 0;
        for (id, backend) in self.known.iter() {
            if self.table.get(&id)? != Some(backend.generation) {
                different += 1;
                self.table.insert(&id, &backend.generation)?;
            }
        }
        Ok(different)
    }

    /// UDP backends that came and went since this was asked last.
    pub(in crate::reconcile) fn take_moved(&mut self) -> Vec<SocketUpdate> {
        std::mem::take(&mut self.moved)
    }

    /// All UDP backends that have a number, or may have had one that an earlier agent gave them.
    pub(in crate::reconcile) fn udp(&self) -> impl Iterator<Item = UdpBackend> {
        let known = self.known.iter().map(|(_, backend)| &backend.key);
        known.chain(self.kept.keys()).filter_map(BackendKey::udp)
    }

    /// Numbers given out.
    pub(in crate::reconcile) fn used(&self) -> usize {
        self.known.len()
    }
}
