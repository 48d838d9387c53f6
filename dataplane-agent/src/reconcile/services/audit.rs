//! Are the tables still as they were written? What differs is written again by later work.

use std::collections::{BTreeSet, HashMap};

use dataplane_common::abi::{Service, ServiceKey};

use super::{Row, ServiceWork, Services};
use crate::{datapath::table::TableError, reconcile::services::ranges::Ranges};

impl Services {
    /// Compares the frontends with the table. Returns how many differ.
    pub(in crate::reconcile) fn audit_frontends(&mut self) -> Result<u64, TableError> {
        let found: HashMap<_, _> = self.table.entries()?.into_iter().collect();
        let mut different: BTreeSet<ServiceKey> = BTreeSet::new();
        let same =
            |key: &ServiceKey, value: &Service| self.rows.get(key).is_some_and(|row| row.value == *value);
        different.extend(found.iter().filter(|(key, value)| !same(key, value)).map(|(key, _)| *key));
        different.extend(self.rows.keys().filter(|key| !found.contains_key(key)));
        for key in &different {
            // the range stays held until the row is right, wherever the row points now
            let row = self.rows.entry(*key).or_insert_with(|| Row { value: found[key], ranges: Vec::new() });
            if let Some(value) = found.get(key) {
                row.value = *value;
            }
            self.broken.insert(*key);
            self.revisit(key);
        }
        Ok(different.len() as u64)
    }

    /// Compares the ranges with the table. Returns how many differ.
    pub(in crate::reconcile) fn audit_ranges(&mut self) -> Result<u64, TableError> {
        let different = self.ranges.differing(&self.backends)?;
        for start in &different {
            self.ranges.distrust(*start);
        }
        let keys =
            self.rows.iter().filter(|(_, row)| row.ranges.iter().any(|start| different.contains(start)));
        for key in keys.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.revisit(&key);
        }
        Ok(different.len() as u64)
    }

    fn revisit(&mut self, key: &ServiceKey) {
        let holder = self.claims.get(key).and_then(|claims| claims.first());
        let work =
            holder.map_or(ServiceWork::Frontend(*key), |port| ServiceWork::Service(port.service.clone()));
        self.queue.push(work);
    }
}

impl Ranges {
    /// First slots of the ranges that do not hold what was written.
    fn differing(&self, backends: &super::Backends) -> Result<BTreeSet<u32>, TableError> {
        let mut different = BTreeSet::new();
        for (start, content) in self.contents() {
            for (index, id) in (start..).zip(content) {
                if self.table.get(&index)? != backends.slot(*id) {
                    different.insert(start);
                    break;
                }
            }
        }
        Ok(different)
    }
}
