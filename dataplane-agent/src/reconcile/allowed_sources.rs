//! Writes `ALLOWED_SOURCES`: the sources that pods may use besides their own addresses.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_common::abi::AllowedSource;
use ipnet::IpNet;

use super::instrumented::InstrumentedTable;
use crate::{
    api::views::TableView,
    compile::prefixes::prefixes,
    datapath::table::{AllowedPrefix, Table, TableError},
};

/// Prefix bits before the address: the device's index.
const IFINDEX_BITS: u32 = u32::BITS;

/// The rows of `ALLOWED_SOURCES`.
#[derive(Debug)]
pub struct AllowedSources {
    table: InstrumentedTable<AllowedPrefix, u32>,
    /// By name of the pod's host-side device.
    desired: BTreeMap<String, BTreeSet<AllowedPrefix>>,
    actual: BTreeSet<AllowedPrefix>,
    /// `desired` is complete: other rows are removed.
    loaded: bool,
}

impl AllowedSources {
    /// Adopts the rows of an earlier agent.
    pub fn adopt(table: Box<dyn Table<AllowedPrefix, u32>>) -> Result<Self, TableError> {
        let table = InstrumentedTable::new(table);
        let actual = table.entries()?.into_iter().map(|(key, _)| key).collect();
        Ok(Self { table, desired: BTreeMap::new(), actual, loaded: false })
    }

    /// Sets the sources of a pod, and writes the difference before it returns.
    pub fn set(&mut self, device: &str, ifindex: u32, sources: &[IpNet]) -> Result<(), TableError> {
        let keys: BTreeSet<_> = sources.iter().flat_map(|source| keys(ifindex, source)).collect();
        self.desired.insert(device.to_owned(), keys.clone());
        // the kernel may have given the index of a device that is gone to this one
        let is_stale = |key: &&AllowedPrefix| key.source.ifindex == ifindex && !keys.contains(*key);
        let stale: Vec<_> = self.actual.iter().filter(is_stale).copied().collect();
        self.remove_rows(stale)?;
        self.write_rows(keys)
    }

    /// Removes the sources of a pod. A pod without sources is not an error.
    pub fn remove(&mut self, device: &str) -> Result<(), TableError> {
        let gone = self.desired.remove(device).unwrap_or_default();
        self.remove_rows(gone)
    }

    /// Every pod of this node was passed to [`Self::set`]: rows of others are removed.
    pub fn pods_loaded(&mut self) -> Result<(), TableError> {
        self.loaded = true;
        self.remove_undesired()
    }

    /// Reads the table and repairs rows that differ from what was written. Returns their number.
    pub fn audit(&mut self) -> Result<u64, TableError> {
        if !self.loaded {
            return Ok(0);
        }
        let found: BTreeSet<_> = self.table.entries()?.into_iter().map(|(key, _)| key).collect();
        let different = found.symmetric_difference(&self.actual).count();
        self.actual = found;
        self.write_rows(self.desired.values().flatten().copied().collect::<Vec<_>>())?;
        self.remove_undesired()?;
        Ok(different as u64)
    }

    /// The table's row in `status`.
    pub fn view(&self) -> TableView {
        self.table.view(self.actual.len())
    }

    fn remove_undesired(&mut self) -> Result<(), TableError> {
        let desired: BTreeSet<_> = self.desired.values().flatten().copied().collect();
        let gone: Vec<_> = self.actual.difference(&desired).copied().collect();
        self.remove_rows(gone)
    }

    fn write_rows(&mut self, keys: impl IntoIterator<Item = AllowedPrefix>) -> Result<(), TableError> {
        for key in keys {
            if !self.actual.contains(&key) {
                self.table.insert(&key, &1)?;
                self.actual.insert(key);
            }
        }
        Ok(())
    }

    fn remove_rows(&mut self, keys: impl IntoIterator<Item = AllowedPrefix>) -> Result<(), TableError> {
        for key in keys {
            if self.actual.contains(&key) {
                self.table.remove(&key)?;
                self.actual.remove(&key);
            }
        }
        Ok(())
    }
}

/// Converts a network to table keys.
fn keys(ifindex: u32, network: &IpNet) -> impl Iterator<Item = AllowedPrefix> {
    let key = move |(addr, bits)| AllowedPrefix {
        source: AllowedSource { ifindex, addr },
        bits: IFINDEX_BITS + bits,
    };
    prefixes(network).into_iter().map(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::testing::MemoryTable;

    fn networks(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// Device index, address and length in bits of each row.
    fn rows(table: &MemoryTable<AllowedPrefix, u32>) -> Vec<String> {
        let mut keys: Vec<_> = table.entries().unwrap().into_iter().map(|(key, _)| key).collect();
        keys.sort_unstable();
        keys.iter()
            .map(|it| format!("{} {}/{}", it.source.ifindex, it.source.addr.to_ip(), it.bits))
            .collect()
    }

    #[test]
    fn rows_follow_the_pods() {
        let table = MemoryTable::hash("ALLOWED_SOURCES", 8);
        let mut sources = AllowedSources::adopt(Box::new(table.clone())).unwrap();
        sources.set("dpa", 7, &networks(&["10.9.0.0/16", "fd00:9::/64"])).unwrap();
        sources.set("dpb", 8, &[]).unwrap();
        assert_eq!(rows(&table), ["7 10.9.0.0/144", "7 fd00:9::/96"]);
        let before = table.writes();
        sources.set("dpa", 7, &networks(&["10.9.0.0/16", "fd00:9::/64"])).unwrap();
        assert_eq!(table.writes(), before, "unchanged rows were written");
        sources.remove("dpa").unwrap();
        sources.remove("dpa").unwrap();
        assert_eq!(rows(&table), [""; 0]);
    }

    #[test]
    fn rows_of_an_earlier_agent_are_kept_until_all_pods_are_known() {
        let table = MemoryTable::hash("ALLOWED_SOURCES", 8);
        let mut first = AllowedSources::adopt(Box::new(table.clone())).unwrap();
        first.set("dpa", 7, &networks(&["10.9.0.0/16"])).unwrap();
        first.set("dpb", 8, &networks(&["10.8.0.0/16"])).unwrap();
        first.set("dpc", 9, &networks(&["10.7.0.0/16"])).unwrap();
        let mut second = AllowedSources::adopt(Box::new(table.clone())).unwrap();
        // dpc is gone, and its index belongs to a pod without sources
        let before = table.writes();
        second.set("dpa", 7, &networks(&["10.9.0.0/16"])).unwrap();
        assert_eq!(table.writes(), before, "an adopted row was written again");
        second.set("dpd", 9, &[]).unwrap();
        assert_eq!(second.audit().unwrap(), 0);
        assert_eq!(rows(&table), ["7 10.9.0.0/144", "8 10.8.0.0/144"]);
        second.pods_loaded().unwrap();
        assert_eq!(rows(&table), ["7 10.9.0.0/144"]);
    }

    #[test]
    fn audit_repairs_rows() {
        let mut table = MemoryTable::hash("ALLOWED_SOURCES", 8);
        let mut sources = AllowedSources::adopt(Box::new(table.clone())).unwrap();
        sources.set("dpa", 7, &networks(&["10.9.0.0/16"])).unwrap();
        sources.pods_loaded().unwrap();
        let [row] = table.entries().unwrap()[..] else { panic!("one row") };
        table.remove(&row.0).unwrap();
        let other = AllowedSource { ifindex: 9, ..row.0.source };
        table.insert(&AllowedPrefix { source: other, ..row.0 }, &1).unwrap();
        assert_eq!(sources.audit().unwrap(), 2);
        assert_eq!(rows(&table), ["7 10.9.0.0/144"]);
        assert_eq!(sources.audit().unwrap(), 0);
    }

    #[test]
    fn full_table_is_reported_and_removal_frees_it() {
        let table = MemoryTable::hash("ALLOWED_SOURCES", 1);
        let mut sources = AllowedSources::adopt(Box::new(table.clone())).unwrap();
        let error = sources.set("dpa", 7, &networks(&["10.8.0.0/16", "10.9.0.0/16"])).unwrap_err();
        assert_eq!(error.to_string(), "table ALLOWED_SOURCES is full (1 entries)");
        sources.remove("dpa").unwrap();
        assert_eq!(rows(&table), [""; 0]);
    }
}
