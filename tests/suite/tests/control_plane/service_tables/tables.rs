//! The tables of a node, in memory: as maps of the kernel behave, with a count of the writes to each key.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dataplane_agent::{
    datapath::table::{RoutePrefix, SourcePrefix, Table, TableError},
    reconcile::ReconcileTables,
};
use dataplane_common::abi::{Addr, BackendSlot, Endpoint, Route, Service, ServiceKey, names::map};

/// Slots: Maglev tables of all services at once, the ranges they replace, and those that rest.
const SLOTS: u32 = 65_536;
const ROOM: u32 = 1_024;

/// A table; clones share it, as holders of one map do.
#[derive(Clone, Debug)]
pub(crate) struct Memory<K, V> {
    name: &'static str,
    capacity: u32,
    /// Of an array, whose slots are all there from the start, what nobody has written.
    blank: Option<V>,
    rows: Arc<Mutex<Rows<K, V>>>,
}

#[derive(Debug)]
struct Rows<K, V> {
    there: BTreeMap<K, V>,
    /// Writes and removals of each key since they were taken last.
    writes: BTreeMap<K, u32>,
}

impl<K: Ord + Copy, V: Copy> Memory<K, V> {
    fn new(name: &'static str, capacity: u32, blank: Option<V>) -> Self {
        let rows = Rows { there: BTreeMap::new(), writes: BTreeMap::new() };
        Self { name, capacity, blank, rows: Arc::new(Mutex::new(rows)) }
    }

    /// Writes and removals of each key since this was asked last.
    pub(crate) fn take_writes(&self) -> BTreeMap<K, u32> {
        std::mem::take(&mut self.lock().writes)
    }

    pub(crate) fn row(&self, key: &K) -> Option<V> {
        self.lock().there.get(key).copied().or(self.blank)
    }

    /// What was ever written and not removed.
    pub(crate) fn rows(&self) -> Vec<(K, V)> {
        self.lock().there.iter().map(|(key, value)| (*key, *value)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Rows<K, V>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, V> Table<K, V> for Memory<K, V>
where
    K: Ord + Copy + Debug + Send,
    V: Copy + Send,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        Ok(self.row(key))
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let mut rows = self.lock();
        if !rows.there.contains_key(key) && rows.there.len() >= self.capacity as usize {
            return Err(TableError::Full { table: self.name, capacity: self.capacity });
        }
        rows.there.insert(*key, *value);
        *rows.writes.entry(*key).or_default() += 1;
        Ok(())
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let mut rows = self.lock();
        rows.there.remove(key);
        *rows.writes.entry(*key).or_default() += 1;
        Ok(())
    }

    fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        Ok(self.rows())
    }

    fn capacity(&self) -> u32 {
        self.capacity
    }
}

/// The tables a node's agent writes.
#[derive(Clone, Debug)]
pub(crate) struct Tables {
    pub(crate) endpoints: Memory<Addr, Endpoint>,
    pub(crate) routes: Memory<RoutePrefix, Route>,
    pub(crate) services: Memory<ServiceKey, Service>,
    pub(crate) backends: Memory<u32, BackendSlot>,
    pub(crate) generations: Memory<u32, u32>,
    pub(crate) source_ranges: Memory<SourcePrefix, u32>,
}

impl Tables {
    pub(crate) fn new() -> Self {
        Self {
            endpoints: Memory::new(map::ENDPOINTS, ROOM, None),
            routes: Memory::new(map::ROUTES, ROOM, None),
            services: Memory::new(map::SERVICES, ROOM, None),
            backends: Memory::new(map::BACKENDS, SLOTS, Some(BackendSlot::default())),
            generations: Memory::new(map::BACKEND_GENERATIONS, ROOM, Some(0)),
            source_ranges: Memory::new(map::SOURCE_RANGES, ROOM, None),
        }
    }
}

impl From<&Tables> for ReconcileTables {
    fn from(tables: &Tables) -> Self {
        Self {
            endpoints: Box::new(tables.endpoints.clone()),
            routes: Box::new(tables.routes.clone()),
            services: Box::new(tables.services.clone()),
            backends: Box::new(tables.backends.clone()),
            backend_generations: Box::new(tables.generations.clone()),
            source_ranges: Box::new(tables.source_ranges.clone()),
        }
    }
}
