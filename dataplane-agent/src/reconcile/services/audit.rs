//! Audits the Service tables: rows that differ from what was written are written again by later
//! work.

use std::collections::{BTreeSet, HashMap};

use dataplane_common::abi::{Service, ServiceKey};

use super::{ServiceWork, Services};
use crate::{datapath::table::TableError, reconcile::services::ranges::Ranges};

impl Services {
    /// Compares the frontends with the table. Returns the number of differences.
    pub(in crate::reconcile) fn audit_frontends(&mut self) -> Result<u64, TableError> {
        let found: HashMap<_, _> = self.table.entries()?.into_iter().collect();
        let mut different: BTreeSet<ServiceKey> = BTreeSet::new();
        let same = |key: &ServiceKey, value: &Service| self.rows.get(key) == Some(value);
        different.extend(found.iter().filter(|(key, value)| !same(key, value)).map(|(key, _)| *key));
        different.extend(self.rows.keys().filter(|key| !found.contains_key(key)));
        for key in &different {
            // the old range stays in use until the row is repaired, wherever the row points now
            let ranges = self.rows.get(key).map(|row| self.ranges_of(key, row)).unwrap_or_default();
            self.broken.insert(*key, ranges);
            self.rows.extend(found.get_key_value(key));
            self.requeue(key);
        }
        Ok(different.len() as u64)
    }

    /// Compares the ranges with the table. Returns the number of differences.
    pub(in crate::reconcile) fn audit_ranges(&mut self) -> Result<u64, TableError> {
        let different = self.ranges.differing(&self.backends)?;
        for start in &different {
            self.ranges.invalidate(*start);
        }
        let uses_different = |(key, row): &(&ServiceKey, &Service)| {
            self.ranges_of(key, row).iter().any(|start| different.contains(start))
        };
        let keys: Vec<_> = self.rows.iter().filter(uses_different).map(|(key, _)| *key).collect();
        for key in keys {
            self.requeue(&key);
        }
        Ok(different.len() as u64)
    }

    fn requeue(&mut self, key: &ServiceKey) {
        let owner = self.owners.get(key);
        let work =
            owner.map_or(ServiceWork::Frontend(*key), |port| ServiceWork::Service(port.service.clone()));
        self.queue.push(work);
    }
}

impl Ranges {
    /// First slots of ranges whose content differs from what was written.
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
