//! Reconciles `BACKEND_GENERATIONS`: a stable ID for every backend of a service, and whether the
//! service still has it.
//!
//! IDs are not shared between services: the flows of a service that loses a backend become stale,
//! and those of other services to the same backend do not.
//!
//! A generation is odd while its ID is in use, even while it is free. A new agent can therefore
//! find IDs that its predecessor did not free, and a flow to a removed backend stays stale after
//! its ID is reused.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Instant,
};

use dataplane_common::abi::{Addr, BackendSlot, Port};

use super::backend_index::BackendIndex;
use crate::{
    datapath::table::{Table, TableError},
    reconcile::{
        backoff::WorkQueue,
        instrumented::InstrumentedTable,
        sockets::{SocketUpdate, UdpBackend},
    },
    state::TransportProtocol,
};

/// A backend of a service: each has an ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::reconcile) struct BackendKey {
    /// ID of the service port; 0 for an ID that an earlier agent used for several services.
    pub(in crate::reconcile) service: u32,
    pub(in crate::reconcile) addr: Addr,
    pub(in crate::reconcile) port: Port,
    pub(in crate::reconcile) protocol: u8,
}

impl BackendKey {
    /// The backend as the peer of connected UDP sockets; `None` for other protocols.
    fn udp(&self) -> Option<UdpBackend> {
        let is_udp = self.protocol == TransportProtocol::Udp.number();
        is_udp.then_some(UdpBackend { service: self.service, addr: self.addr, port: self.port })
    }

    /// The same backend, of no service in particular.
    const fn shared(mut self) -> Self {
        self.service = 0;
        self
    }
}

#[derive(Debug)]
pub(super) struct Backend {
    pub(super) key: BackendKey,
    /// As in the table.
    pub(super) generation: u32,
    /// Number of ranges that contain it.
    pub(super) ranges: u32,
}

/// The allocated IDs.
#[derive(Debug)]
pub(in crate::reconcile) struct Backends {
    pub(in crate::reconcile) table: InstrumentedTable<u32, u32>,
    index: BackendIndex,
    /// Free IDs below `next`; all IDs from `next` on are free.
    freed: BTreeSet<u32>,
    next: u32,
    /// The next ID to check for one that an earlier agent left allocated; `None`: all are checked.
    next_scan: Option<u32>,
    /// Serving UDP backends. They keep their ID even if no range contains them.
    serving: HashSet<BackendKey>,
    /// IDs that an earlier agent used for several services, and what it used them for. New ranges
    /// have other IDs, and these stay allocated for its flows while one of the services has the
    /// backend.
    shared: BTreeMap<u32, BTreeSet<BackendKey>>,
    /// Every service was delivered and written.
    swept: bool,
    /// Number of services of each UDP backend with an ID.
    udp_services: HashMap<BackendKey, u32>,
    /// UDP backends whose ID was allocated or freed.
    udp_updates: Vec<SocketUpdate>,
    /// IDs that may be unused.
    pub(in crate::reconcile) queue: WorkQueue<u32>,
}

/// IDs checked in one step of the scan.
const SCAN_BATCH: u32 = 2_048;

const fn in_use(generation: u32) -> bool {
    generation & 1 == 1
}

impl Backends {
    pub(super) fn new(table: Box<dyn Table<u32, u32>>) -> Self {
        Self {
            table: InstrumentedTable::new(table),
            index: BackendIndex::default(),
            freed: BTreeSet::new(),
            next: 0,
            next_scan: None,
            serving: HashSet::new(),
            shared: BTreeMap::new(),
            swept: false,
            udp_services: HashMap::new(),
            udp_updates: Vec::new(),
            queue: WorkQueue::default(),
        }
    }

    /// Adopts the IDs of a range. Returns `None`, and adopts nothing, if they contradict other
    /// ranges or the generations.
    pub(super) fn adopt_slots(
        &mut self,
        slots: &[BackendSlot],
        service: u32,
        protocol: u8,
    ) -> Result<Option<Vec<u32>>, TableError> {
        let mut new: HashMap<u32, Backend> = HashMap::new();
        let mut shared: Vec<(u32, [BackendKey; 2])> = Vec::new();
        let mut new_ids: HashMap<BackendKey, u32> = HashMap::new();
        for slot in slots {
            let key = BackendKey { service, addr: slot.addr, port: slot.port, protocol };
            let generation = match self.index.get(slot.id).or_else(|| new.get(&slot.id)) {
                Some(backend) if backend.key == key => backend.generation,
                Some(backend) if backend.key.shared() == key.shared() => {
                    shared.push((slot.id, [backend.key, key]));
                    backend.generation
                }
                Some(_) => return Ok(None),
                None => match self.table.get(&slot.id)? {
                    Some(generation) => generation,
                    None => return Ok(None),
                },
            };
            let consistent = in_use(generation)
                && slot.generation == generation
                && slot.reserved == 0
                && self.id(&key).is_none_or(|id| id == slot.id)
                && *new_ids.entry(key).or_insert(slot.id) == slot.id;
            if !consistent {
                return Ok(None);
            }
            new.insert(slot.id, Backend { key, generation, ranges: 0 });
        }
        for (id, backend) in new {
            if self.index.get(id).is_none() {
                self.count_udp(&backend.key);
                self.index.insert(id, backend);
            }
        }
        for (id, keys) in shared {
            self.shared.entry(id).or_default().extend(keys);
        }
        Ok(Some(slots.iter().map(|slot| slot.id).collect()))
    }

    /// Ends adoption: all other IDs are free.
    pub(super) fn finish_adoption(&mut self) {
        for id in self.shared.keys() {
            if let Some(Backend { key, generation, ranges }) = self.index.remove(*id) {
                self.index.insert(*id, Backend { key: key.shared(), generation, ranges });
            }
        }
        self.next = self.index.iter().last().map_or(0, |(id, _)| id + 1);
        self.freed = (0..self.next).filter(|id| self.index.get(*id).is_none()).collect();
    }

    /// Whether an earlier agent used the ID for several services.
    pub(super) fn is_shared(&self, id: u32) -> bool {
        self.shared.contains_key(&id)
    }

    /// Starts the scan for IDs that an earlier agent left allocated.
    pub(super) fn sweep(&mut self) {
        self.next_scan = Some(0);
        self.swept = true;
        for id in self.shared.keys() {
            self.queue.push(*id);
        }
    }

    /// Checks some IDs. Each costs a system call and nothing waits for the result.
    pub(super) fn scan_step(&mut self) {
        let Some(first) = self.next_scan else { return };
        let last = first.saturating_add(SCAN_BATCH).min(self.table.capacity());
        for id in first..last {
            if self.index.get(id).is_some() {
                continue;
            }
            // an unreadable ID is read again when it is allocated
            if self.table.get(&id).is_ok_and(|generation| generation.is_some_and(in_use)) {
                self.queue.push(id);
            }
        }
        self.next_scan = (last < self.table.capacity()).then_some(last);
    }

    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        if self.next_scan.is_some() { Some(now) } else { self.queue.next_due(now) }
    }

    /// The ID of a backend, if it has one.
    pub(super) fn id(&self, key: &BackendKey) -> Option<u32> {
        self.index.find(key)
    }

    pub(super) fn key(&self, id: u32) -> Option<&BackendKey> {
        self.index.get(id).map(|backend| &backend.key)
    }

    /// The content of a slot with this backend.
    pub(super) fn slot(&self, id: u32) -> Option<BackendSlot> {
        let Backend { key, generation, .. } = self.index.get(id)?;
        Some(BackendSlot { addr: key.addr, id, generation: *generation, port: key.port, reserved: 0 })
    }

    /// Returns the ID of a backend, allocating one if needed. It is freed later unless a range
    /// acquires it.
    pub(super) fn allocate(&mut self, key: BackendKey) -> Result<u32, TableError> {
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
        self.udp_updates.extend(key.udp().map(SocketUpdate::BackendAdded));
        if self.count_udp(&key) {
            self.udp_updates.extend(key.shared().udp().map(SocketUpdate::BackendAdded));
        }
        self.index.insert(id, Backend { key, generation, ranges: 0 });
        self.queue.push(id);
        Ok(id)
    }

    /// A range contains these IDs.
    pub(super) fn acquire(&mut self, ids: &[u32]) {
        for id in ids {
            if let Some(backend) = self.index.get_mut(*id) {
                backend.ranges += 1;
            }
        }
    }

    /// A range no longer contains these IDs.
    pub(super) fn release(&mut self, ids: &[u32]) {
        for id in ids {
            if let Some(backend) = self.index.get_mut(*id) {
                backend.ranges -= 1;
                if backend.ranges == 0 {
                    self.queue.push(*id);
                }
            }
        }
    }

    /// These backends serve.
    pub(super) fn add_serving<'a>(&mut self, keys: impl Iterator<Item = &'a BackendKey>) {
        self.serving.extend(keys);
    }

    /// Reverts [`Self::add_serving`].
    pub(super) fn remove_serving<'a>(&mut self, keys: impl Iterator<Item = &'a BackendKey>) {
        for key in keys {
            self.serving.remove(key);
            for key in [*key, key.shared()] {
                if let Some(id) = self.id(&key) {
                    self.queue.push(id);
                }
            }
        }
    }

    /// Counts a service of the backend, which gets an ID. Returns whether it is the first.
    fn count_udp(&mut self, key: &BackendKey) -> bool {
        if key.udp().is_none() {
            return false;
        }
        let services = self.udp_services.entry(key.shared()).or_default();
        *services += 1;
        *services == 1
    }

    /// Reverts [`Self::count_udp`]. Returns whether it was the last.
    fn uncount_udp(&mut self, key: &BackendKey) -> bool {
        let Some(services) = self.udp_services.get_mut(&key.shared()) else { return false };
        *services -= 1;
        let is_last = *services == 0;
        if is_last {
            self.udp_services.remove(&key.shared());
        }
        is_last
    }

    /// Whether flows with the ID of the backend continue although no range contains it.
    fn serves(&self, id: u32, key: &BackendKey) -> bool {
        let has_backend = |key: &BackendKey| self.serving.contains(key) || self.id(key).is_some();
        match self.shared.get(&id) {
            Some(keys) => !self.swept || keys.iter().any(has_backend),
            None => self.serving.contains(key),
        }
    }

    /// Reconciles one due ID. Returns `false` if there is none.
    pub(super) fn work_one(&mut self, now: Instant) -> bool {
        let Some(id) = self.queue.pop(now) else { return false };
        match self.free_if_unused(id) {
            Ok(()) => self.queue.done(&id),
            Err(error) => self.queue.fail(id, error.to_string(), now),
        }
        true
    }

    /// Frees the ID if no range contains it and its backend does not serve: flows that use it
    /// become stale.
    fn free_if_unused(&mut self, id: u32) -> Result<(), TableError> {
        match self.index.get(id) {
            Some(backend) if backend.ranges > 0 || self.serves(id, &backend.key) => {}
            Some(Backend { key, generation, .. }) => {
                let key = *key;
                self.table.insert(&id, &generation.wrapping_add(1))?;
                self.index.remove(id);
                self.freed.insert(id);
                self.shared.remove(&id);
                // the datapath has no sockets of a shared ID: an earlier one did not record
                // services
                if key != key.shared() {
                    self.udp_updates.extend(key.udp().map(SocketUpdate::BackendRemoved));
                }
                if self.uncount_udp(&key) {
                    self.udp_updates.extend(key.shared().udp().map(SocketUpdate::BackendRemoved));
                }
                if let Some(shared) = self.id(&key.shared()) {
                    self.queue.push(shared);
                }
            }
            None => {
                if let Some(generation) = self.table.get(&id)?.filter(|generation| in_use(*generation)) {
                    self.table.insert(&id, &generation.wrapping_add(1))?;
                }
            }
        }
        Ok(())
    }

    /// Compares the allocated IDs with the table and repairs it. Returns the number of differences.
    pub(in crate::reconcile) fn audit(&mut self) -> Result<u64, TableError> {
        let mut different = 0;
        for (id, backend) in self.index.iter() {
            if self.table.get(&id)? != Some(backend.generation) {
                different += 1;
                self.table.insert(&id, &backend.generation)?;
            }
        }
        Ok(different)
    }

    /// UDP backends added and removed since the last call.
    pub(in crate::reconcile) fn take_udp_updates(&mut self) -> Vec<SocketUpdate> {
        std::mem::take(&mut self.udp_updates)
    }

    /// All UDP backends with an ID, or that may have one from an earlier agent; also those of no
    /// service in particular.
    pub(in crate::reconcile) fn udp(&self) -> impl Iterator<Item = UdpBackend> {
        let index = self.index.iter().map(|(_, backend)| &backend.key);
        let both = |key: &BackendKey| [*key, key.shared()];
        index.chain(&self.serving).flat_map(both).filter_map(|key| key.udp())
    }

    /// Number of allocated IDs.
    pub(in crate::reconcile) fn used(&self) -> usize {
        self.index.len()
    }
}
