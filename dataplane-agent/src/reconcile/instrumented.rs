//! A table with counters, for metrics and for the test that a restart writes nothing.

use std::fmt;

use crate::{
    api::views::TableView,
    datapath::table::{Table, TableError},
};

/// The table and its counters since the agent started.
pub struct InstrumentedTable<K, V> {
    table: Box<dyn Table<K, V>>,
    writes: u64,
    removals: u64,
    errors: u64,
}

impl<K, V> InstrumentedTable<K, V> {
    pub fn new(table: Box<dyn Table<K, V>>) -> Self {
        Self { table, writes: 0, removals: 0, errors: 0 }
    }

    pub fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        self.table.get(key)
    }

    pub fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        self.table.entries()
    }

    pub fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let done = self.table.insert(key, value);
        *if done.is_ok() { &mut self.writes } else { &mut self.errors } += 1;
        done
    }

    pub fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let done = self.table.remove(key);
        *if done.is_ok() { &mut self.removals } else { &mut self.errors } += 1;
        done
    }

    pub fn name(&self) -> &'static str {
        self.table.name()
    }

    pub fn capacity(&self) -> u32 {
        self.table.capacity()
    }

    /// Failed writes and removals.
    pub const fn errors(&self) -> u64 {
        self.errors
    }

    /// Successful writes and removals.
    pub const fn changes(&self) -> u64 {
        self.writes + self.removals
    }

    /// The table's row in `status`. `used` is the number of entries in use.
    pub fn view(&self, used: usize) -> TableView {
        TableView {
            name: self.table.name().to_owned(),
            used: used as u64,
            capacity: u64::from(self.table.capacity()),
            writes: self.writes,
            removals: self.removals,
        }
    }
}

impl<K, V> fmt::Debug for InstrumentedTable<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InstrumentedTable").field("table", &self.table.name()).finish_non_exhaustive()
    }
}
