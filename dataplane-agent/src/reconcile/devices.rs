//! Writes `DEVICES`: the devices that carry the node's traffic.
//!
//! A row is written before the programs of its device are attached, and removed after they are
//! detached, by the caller.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_common::abi::Device;

use super::instrumented::InstrumentedTable;
use crate::{
    api::views::TableView,
    compile,
    datapath::table::{Table, TableError},
    netlink::Uplink,
};

/// The rows of `DEVICES`.
#[derive(Debug)]
pub struct Devices {
    table: InstrumentedTable<u32, Device>,
    actual: BTreeMap<u32, Device>,
}

impl Devices {
    /// Adopts the rows of an earlier agent.
    pub fn adopt(table: Box<dyn Table<u32, Device>>) -> Result<Self, TableError> {
        let table = InstrumentedTable::new(table);
        let actual = table.entries()?.into_iter().collect();
        Ok(Self { table, actual })
    }

    /// Writes the row of a device if it differs.
    pub fn set(&mut self, uplink: &Uplink) -> Result<(), TableError> {
        let row = compile::devices::device(uplink);
        if self.actual.get(&uplink.ifindex) != Some(&row) {
            self.table.insert(&uplink.ifindex, &row)?;
            self.actual.insert(uplink.ifindex, row);
        }
        Ok(())
    }

    /// Removes the rows of all devices that are not among `uplinks`.
    pub fn retain(&mut self, uplinks: &[Uplink]) -> Result<(), TableError> {
        let kept: BTreeSet<u32> = uplinks.iter().map(|uplink| uplink.ifindex).collect();
        let gone: Vec<u32> = self.actual.keys().filter(|ifindex| !kept.contains(ifindex)).copied().collect();
        for ifindex in gone {
            self.table.remove(&ifindex)?;
            self.actual.remove(&ifindex);
        }
        Ok(())
    }

    /// Reads the table and writes rows that differ from what was written. Returns their number.
    pub fn audit(&mut self, uplinks: &[Uplink]) -> Result<u64, TableError> {
        let found: BTreeMap<_, _> = self.table.entries()?.into_iter().collect();
        let keys: BTreeSet<&u32> = found.keys().chain(self.actual.keys()).collect();
        let different = keys.into_iter().filter(|key| found.get(key) != self.actual.get(key)).count();
        self.actual = found;
        for uplink in uplinks {
            self.set(uplink)?;
        }
        self.retain(uplinks)?;
        Ok(different as u64)
    }

    /// The table's row in `status`.
    pub fn view(&self) -> TableView {
        self.table.view(self.actual.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::testing::MemoryTable;

    fn uplink(ifindex: u32, source: &str) -> Uplink {
        Uplink {
            name: format!("eth{ifindex}"),
            ifindex,
            mtu: 1_500,
            mac: None,
            addresses: Vec::new(),
            sources: vec![source.parse().unwrap()],
            bridge: false,
        }
    }

    #[test]
    fn rows_of_an_earlier_agent_are_adopted_updated_and_removed() {
        let table = MemoryTable::hash("DEVICES", 8);
        let mut first = Devices::adopt(Box::new(table.clone())).unwrap();
        for uplink in [uplink(2, "10.0.0.5"), uplink(3, "10.0.1.5")] {
            first.set(&uplink).unwrap();
        }
        let mut second = Devices::adopt(Box::new(table.clone())).unwrap();
        let before = table.writes();
        second.set(&uplink(2, "10.0.0.5")).unwrap();
        assert_eq!(table.writes(), before, "an unchanged row was written");
        let changed = [uplink(2, "10.0.0.6")];
        second.set(&changed[0]).unwrap();
        second.retain(&changed).unwrap();
        assert_eq!(table.entries().unwrap(), [(2, compile::devices::device(&changed[0]))]);
    }

    #[test]
    fn audit_repairs_rows() {
        let mut table = MemoryTable::hash("DEVICES", 8);
        let uplinks = [uplink(2, "10.0.0.5")];
        let mut devices = Devices::adopt(Box::new(table.clone())).unwrap();
        devices.set(&uplinks[0]).unwrap();
        table.remove(&2).unwrap();
        table.insert(&9, &compile::devices::device(&uplink(9, "10.0.0.9"))).unwrap();
        assert_eq!(devices.audit(&uplinks).unwrap(), 2);
        assert_eq!(table.entries().unwrap(), [(2, compile::devices::device(&uplinks[0]))]);
        assert_eq!(devices.audit(&uplinks).unwrap(), 0);
    }
}
