//! Reconciles `SOURCE_RANGES`: the clients allowed at load balancer addresses.
//!
//! A range is written before a row of `SERVICES` refers to ranges, and removed afterwards. A
//! temporary extra range allows what was allowed before; a missing one would reject allowed
//! clients.

use std::collections::{BTreeSet, HashMap, HashSet};

use dataplane_common::abi::SourceRange;
use ipnet::IpNet;

use crate::{
    compile::prefixes::prefixes,
    datapath::table::{SourcePrefix, Table, TableError},
    reconcile::instrumented::InstrumentedTable,
};

/// Prefix bits before the address: the service ID.
const ID_BITS: u32 = u32::BITS;

/// Actual entries.
#[derive(Debug)]
pub(in crate::reconcile) struct SourceRanges {
    pub(in crate::reconcile) table: InstrumentedTable<SourcePrefix, u32>,
    actual: HashMap<u32, BTreeSet<SourcePrefix>>,
}

impl SourceRanges {
    pub(super) fn new(table: Box<dyn Table<SourcePrefix, u32>>) -> Self {
        Self { table: InstrumentedTable::new(table), actual: HashMap::new() }
    }

    pub(super) fn adopt(&mut self) -> Result<(), TableError> {
        for (prefix, _) in self.table.entries()? {
            self.actual.entry(prefix.range.service_id).or_default().insert(prefix);
        }
        Ok(())
    }

    /// Adds ranges.
    pub(super) fn allow(&mut self, id: u32, ranges: &[IpNet]) -> Result<(), TableError> {
        for prefix in ranges.iter().flat_map(|range| keys(id, range)) {
            if self.actual.get(&id).is_none_or(|actual| !actual.contains(&prefix)) {
                self.table.insert(&prefix, &1)?;
                self.actual.entry(id).or_default().insert(prefix);
            }
        }
        Ok(())
    }

    /// Removes all other ranges.
    pub(super) fn restrict(&mut self, id: u32, ranges: &[IpNet]) -> Result<(), TableError> {
        let Some(actual) = self.actual.get_mut(&id) else { return Ok(()) };
        let desired: BTreeSet<_> = ranges.iter().flat_map(|range| keys(id, range)).collect();
        let removed: Vec<_> = actual.difference(&desired).copied().collect();
        for prefix in removed {
            self.table.remove(&prefix)?;
            actual.remove(&prefix);
        }
        if actual.is_empty() {
            self.actual.remove(&id);
        }
        Ok(())
    }

    /// Removes the ranges of unused IDs.
    pub(super) fn sweep(&mut self, ids: &HashSet<u32>) -> Result<(), TableError> {
        let removed: Vec<u32> = self.actual.keys().filter(|id| !ids.contains(id)).copied().collect();
        removed.into_iter().try_for_each(|id| self.restrict(id, &[]))
    }

    pub(in crate::reconcile) fn used(&self) -> usize {
        self.actual.values().map(BTreeSet::len).sum()
    }
}

/// Converts a range to table keys.
fn keys(service_id: u32, range: &IpNet) -> impl Iterator<Item = SourcePrefix> {
    let key =
        move |(addr, bits)| SourcePrefix { range: SourceRange { service_id, addr }, bits: ID_BITS + bits };
    prefixes(range).into_iter().map(key)
}
