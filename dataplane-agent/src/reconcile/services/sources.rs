//! `SOURCE_RANGES`: who may ask a service at the addresses of its load balancer.
//!
//! A range is there before a row of `SERVICES` says that ranges count, and goes after it. One too many for a moment is what
//! the service allowed until now; one too few would shut out who may ask.

use std::collections::{BTreeSet, HashMap, HashSet};

use dataplane_common::abi::{Addr, SourceRange};
use ipnet::IpNet;

use crate::{
    datapath::table::{SourcePrefix, Table, TableError},
    reconcile::counted::Counted,
};

/// Bits of a prefix in front of the address: the service's number.
const ID_BITS: u32 = u32::BITS;

/// Actual entries.
#[derive(Debug)]
pub(in crate::reconcile) struct Sources {
    pub(in crate::reconcile) table: Counted<SourcePrefix, u32>,
    actual: HashMap<u32, BTreeSet<SourcePrefix>>,
}

impl Sources {
    pub(super) fn new(table: Box<dyn Table<SourcePrefix, u32>>) -> Self {
        Self { table: Counted::new(table), actual: HashMap::new() }
    }

    pub(super) fn adopt(&mut self) -> Result<(), TableError> {
        for (prefix, _) in self.table.entries()? {
            self.actual.entry(prefix.range.service_id).or_default().insert(prefix);
        }
        Ok(())
    }

    /// Lets these clients in.
    pub(super) fn allow(&mut self, id: u32, ranges: &[IpNet]) -> Result<(), TableError> {
        for prefix in ranges.iter().map(|range| prefix(id, range)) {
            if self.actual.get(&id).is_none_or(|actual| !actual.contains(&prefix)) {
                self.table.insert(&prefix, &1)?;
                self.actual.entry(id).or_default().insert(prefix);
            }
        }
        Ok(())
    }

    /// Lets nobody in but these.
    pub(super) fn restrict(&mut self, id: u32, ranges: &[IpNet]) -> Result<(), TableError> {
        let Some(actual) = self.actual.get_mut(&id) else { return Ok(()) };
        let wanted: BTreeSet<_> = ranges.iter().map(|range| prefix(id, range)).collect();
        let gone: Vec<_> = actual.difference(&wanted).copied().collect();
        for prefix in gone {
            self.table.remove(&prefix)?;
            actual.remove(&prefix);
        }
        if actual.is_empty() {
            self.actual.remove(&id);
        }
        Ok(())
    }

    /// Removes the ranges of numbers no service has.
    pub(super) fn sweep(&mut self, ids: &HashSet<u32>) -> Result<(), TableError> {
        let gone: Vec<u32> = self.actual.keys().filter(|id| !ids.contains(id)).copied().collect();
        gone.into_iter().try_for_each(|id| self.restrict(id, &[]))
    }

    pub(in crate::reconcile) fn used(&self) -> usize {
        self.actual.values().map(BTreeSet::len).sum()
    }
}

fn prefix(service_id: u32, range: &IpNet) -> SourcePrefix {
    let range_bits = u32::from(range.prefix_len());
    let bits = if range.addr().is_ipv4() { Addr::V4_PREFIX_BITS + range_bits } else { range_bits };
    let addr = Addr::from(range.network());
    SourcePrefix { range: SourceRange { service_id, addr }, bits: ID_BITS + bits }
}
