//! The tables of a node in memory. They behave like maps of the kernel and count the writes to each
//! key.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dataplane_agent::{
    datapath::table::{RoutePrefix, SourcePrefix, Table, TableError},
    reconcile::ReconcileTables,
};
use dataplane_common::abi::{Addr, BackendSlot, Endpoint, PodSource, Route, Service, ServiceKey, names::map};

/// Slots for the Maglev tables of all services, those they replace, and those not yet reusable.
const SLOTS: u32 = 65_536;
const CAPACITY: u32 = 1_024;

/// A table; clones share its rows, like several handles of one map.
#[derive(Clone, Debug)]
pub(crate) struct Memory<K, V> {
    name: &'static str,
    capacity: u32,
    /// The initial value of all elements, for an array.
    blank: Option<V>,
    rows: Arc<Mutex<Rows<K, V>>>,
}

#[derive(Debug)]
struct Rows<K, V> {
    values: BTreeMap<K, V>,
    /// Writes and removals of each key since the last call of `take_writes`.
    writes: BTreeMap<K, u32>,
}

impl<K: Ord + Copy, V: Copy> Memory<K, V> {
    fn new(name: &'static str, capacity: u32, blank: Option<V>) -> Self {
        let rows = Rows { values: BTreeMap::new(), writes: BTreeMap::new() };
        Self { name, capacity, blank, rows: Arc::new(Mutex::new(rows)) }
    }

    /// Writes and removals of each key since the last call.
    pub(crate) fn take_writes(&self) -> BTreeMap<K, u32> {
        std::mem::take(&mut self.lock().writes)
    }

    pub(crate) fn row(&self, key: &K) -> Option<V> {
        self.lock().values.get(key).copied().or(self.blank)
    }

    /// All rows that were written and not removed.
    pub(crate) fn rows(&self) -> Vec<(K, V)> {
        self.lock().values.iter().map(|(key, value)| (*key, *value)).collect()
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
        if !rows.values.contains_key(key) && rows.values.len() >= self.capacity as usize {
            return Err(TableError::Full { table: self.name, capacity: self.capacity });
        }
        rows.values.insert(*key, *value);
        *rows.writes.entry(*key).or_default() += 1;
        Ok(())
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let mut rows = self.lock();
        rows.values.remove(key);
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

/// The tables that the agent of a node writes.
#[derive(Clone, Debug)]
pub(crate) struct Tables {
    pub(crate) endpoints: Memory<Addr, Endpoint>,
    pub(crate) pod_sources: Memory<u32, PodSource>,
    pub(crate) routes: Memory<RoutePrefix, Route>,
    pub(crate) services: Memory<ServiceKey, Service>,
    pub(crate) backends: Memory<u32, BackendSlot>,
    pub(crate) generations: Memory<u32, u32>,
    pub(crate) source_ranges: Memory<SourcePrefix, u32>,
}

impl Tables {
    pub(crate) fn new() -> Self {
        Self {
            endpoints: Memory::new(map::ENDPOINTS, CAPACITY, None),
            pod_sources: Memory::new(map::POD_SOURCES, CAPACITY, Some(PodSource::default())),
            routes: Memory::new(map::ROUTES, CAPACITY, None),
            services: Memory::new(map::SERVICES, CAPACITY, None),
            backends: Memory::new(map::BACKENDS, SLOTS, Some(BackendSlot::default())),
            generations: Memory::new(map::BACKEND_GENERATIONS, CAPACITY, Some(0)),
            source_ranges: Memory::new(map::SOURCE_RANGES, CAPACITY, None),
        }
    }
}

impl From<&Tables> for ReconcileTables {
    fn from(tables: &Tables) -> Self {
        Self {
            endpoints: Box::new(tables.endpoints.clone()),
            pod_sources: Box::new(tables.pod_sources.clone()),
            routes: Box::new(tables.routes.clone()),
            services: Box::new(tables.services.clone()),
            backends: Box::new(tables.backends.clone()),
            backend_generations: Box::new(tables.generations.clone()),
            source_ranges: Box::new(tables.source_ranges.clone()),
        }
    }
}
