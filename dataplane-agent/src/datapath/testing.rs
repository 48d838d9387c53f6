//! Tables for the unit tests of this crate: [`MemoryTable`] behaves like a kernel map,
//! [`FaultyTable`] injects failures.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::table::{Table, TableError};

/// A map in memory. Clones share the entries, like two handles to one pinned map.
pub struct MemoryTable<K, V> {
    shared: Arc<Shared<K, V>>,
}

struct Shared<K, V> {
    name: &'static str,
    capacity: u32,
    inner: Mutex<Inner<K, V>>,
}

struct Inner<K, V> {
    /// For an array, all slots.
    entries: BTreeMap<K, V>,
    /// For an array, the value of a slot that was never written or was removed.
    empty: Option<V>,
    writes: u64,
}

impl<K: Ord, V> MemoryTable<K, V> {
    /// A hash map: full with `capacity` entries.
    pub fn hash(name: &'static str, capacity: u32) -> Self {
        Self::new(name, capacity, BTreeMap::new(), None)
    }

    fn new(name: &'static str, capacity: u32, entries: BTreeMap<K, V>, empty: Option<V>) -> Self {
        let inner = Inner { entries, empty, writes: 0 };
        Self { shared: Arc::new(Shared { name, capacity, inner: Mutex::new(inner) }) }
    }

    /// Number of inserts and removals so far.
    pub fn writes(&self) -> u64 {
        self.lock().writes
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K, V>> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V: Clone + Default> MemoryTable<u32, V> {
    /// An array: every slot exists, and removing one sets it to the default.
    pub fn array(name: &'static str, capacity: u32) -> Self {
        let slots = (0..capacity).map(|slot| (slot, V::default())).collect();
        Self::new(name, capacity, slots, Some(V::default()))
    }
}

impl<K, V> Clone for MemoryTable<K, V> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<K, V> fmt::Debug for MemoryTable<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryTable").field("name", &self.shared.name).finish_non_exhaustive()
    }
}

impl<K: Ord + Clone + Send, V: Clone + Send> Table<K, V> for MemoryTable<K, V> {
    fn name(&self) -> &'static str {
        self.shared.name
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        Ok(self.lock().entries.get(key).cloned())
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let mut inner = self.lock();
        let fits = inner.entries.contains_key(key) || inner.entries.len() < self.shared.capacity as usize;
        if !fits {
            return Err(TableError::Full { table: self.shared.name, capacity: self.shared.capacity });
        }
        inner.entries.insert(key.clone(), value.clone());
        inner.writes += 1;
        Ok(())
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let mut inner = self.lock();
        match inner.empty.clone() {
            Some(empty) if inner.entries.contains_key(key) => drop(inner.entries.insert(key.clone(), empty)),
            _ => drop(inner.entries.remove(key)),
        }
        inner.writes += 1;
        Ok(())
    }

    fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        Ok(self.lock().entries.iter().map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn capacity(&self) -> u32 {
        self.shared.capacity
    }
}

/// Decides which writes fail. Shared by several tables.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    plan: Arc<Mutex<Plan>>,
}

#[derive(Debug, Default)]
struct Plan {
    calls: u64,
    failing: BTreeSet<u64>,
    /// This call and all later ones fail.
    fail_from: Option<u64>,
}

impl Faults {
    /// Lets these writes fail, counted from now on across all tables.
    pub fn fail(&self, calls: impl IntoIterator<Item = u64>) {
        let mut plan = self.lock();
        let now = plan.calls;
        plan.failing = calls.into_iter().map(|call| now + call).collect();
    }

    /// Lets every write after the next `calls` fail: the state after a crash.
    pub fn fail_after(&self, calls: u64) {
        let mut plan = self.lock();
        plan.fail_from = Some(plan.calls + calls);
    }

    /// Lets all writes succeed again.
    pub fn clear(&self) {
        let mut plan = self.lock();
        plan.failing.clear();
        plan.fail_from = None;
    }

    /// Counts a write, and returns whether it fails.
    fn next_write_fails(&self) -> bool {
        let mut plan = self.lock();
        let call = plan.calls;
        plan.calls += 1;
        plan.fail_from.is_some_and(|first| call >= first) || plan.failing.contains(&call)
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A table whose writes fail as [`Faults`] decides. A failed write changes nothing.
#[derive(Debug)]
pub struct FaultyTable<T> {
    table: T,
    faults: Faults,
}

impl<T> FaultyTable<T> {
    pub const fn new(table: T, faults: Faults) -> Self {
        Self { table, faults }
    }

    fn check(&self, table: &'static str, operation: &'static str) -> Result<(), TableError> {
        if !self.faults.next_write_fails() {
            return Ok(());
        }
        Err(TableError::Kernel { table, operation, source: io::Error::from(io::ErrorKind::ResourceBusy) })
    }
}

impl<K, V, T: Table<K, V>> Table<K, V> for FaultyTable<T> {
    fn name(&self) -> &'static str {
        self.table.name()
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        self.table.get(key)
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        self.check(self.table.name(), "insert")?;
        self.table.insert(key, value)
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        self.check(self.table.name(), "remove")?;
        self.table.remove(key)
    }

    fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        self.table.entries()
    }

    fn capacity(&self) -> u32 {
        self.table.capacity()
    }
}
