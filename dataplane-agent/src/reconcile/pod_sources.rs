//! Writes `POD_SOURCES`, the shortcut from a pod device to its addresses.
//!
//! A slot is written after the row of `ENDPOINTS` that it repeats, and cleared before it. Of two
//! devices that share a slot, one has it; the other's packets are looked up in `ENDPOINTS`.

use std::collections::HashMap;

use dataplane_common::abi::{Addr, Endpoint, PodSource};

use super::instrumented::InstrumentedTable;
use crate::datapath::table::{Table, TableError};

/// The slots in use.
#[derive(Debug)]
pub(super) struct PodSources {
    pub(super) table: InstrumentedTable<u32, PodSource>,
    actual: HashMap<u32, PodSource>,
}

impl PodSources {
    pub(super) fn new(table: Box<dyn Table<u32, PodSource>>) -> Self {
        Self { table: InstrumentedTable::new(table), actual: HashMap::new() }
    }

    /// Writes the slot of a row, if it is free.
    pub(super) fn set(&mut self, addr: Addr, endpoint: &Endpoint) -> Result<(), TableError> {
        let slot = slot(addr, endpoint);
        if endpoint.is_host() || self.actual.contains_key(&slot) {
            return Ok(());
        }
        let source = PodSource { addr, ifindex: endpoint.ifindex };
        self.table.insert(&slot, &source)?;
        self.actual.insert(slot, source);
        Ok(())
    }

    /// Clears the slot of a row that is about to be removed or to change. Returns the slot.
    pub(super) fn clear(&mut self, addr: Addr, endpoint: &Endpoint) -> Result<Option<u32>, TableError> {
        let slot = slot(addr, endpoint);
        if self.actual.get(&slot) != Some(&PodSource { addr, ifindex: endpoint.ifindex }) {
            return Ok(None);
        }
        self.table.remove(&slot)?;
        self.actual.remove(&slot);
        Ok(Some(slot))
    }

    /// The row that waits for a cleared slot.
    pub(super) fn waiting(slot: u32, rows: &HashMap<Addr, Endpoint>) -> Option<Addr> {
        let waits = |(addr, row): &(&Addr, &Endpoint)| !row.is_host() && self::slot(**addr, row) == slot;
        rows.iter().find(waits).map(|(addr, _)| *addr)
    }

    /// Reads the slots and makes them those of `rows`, the rows of `ENDPOINTS`. Returns the number
    /// of slots that differed from what was written.
    pub(super) fn repair(&mut self, rows: &HashMap<Addr, Endpoint>) -> Result<u64, TableError> {
        let mut found: HashMap<u32, PodSource> = self.table.entries()?.into_iter().collect();
        found.retain(|_, source| *source != PodSource::default());
        let missing = self.actual.keys().filter(|slot| !found.contains_key(slot)).count();
        let different = found.iter().filter(|(slot, source)| self.actual.get(slot) != Some(source)).count();
        self.actual = found;
        let is_stale = |(slot, source): (&u32, &PodSource)| {
            let row = rows.get(&source.addr).filter(|row| !row.is_host() && row.ifindex == source.ifindex);
            let is_right = row.is_some_and(|row| self::slot(source.addr, row) == *slot);
            (!is_right).then_some(*slot)
        };
        let stale: Vec<u32> = self.actual.iter().filter_map(is_stale).collect();
        for slot in stale {
            self.table.remove(&slot)?;
            self.actual.remove(&slot);
        }
        for (addr, endpoint) in rows {
            self.set(*addr, endpoint)?;
        }
        Ok((missing + different) as u64)
    }

    pub(super) fn used(&self) -> usize {
        self.actual.len()
    }
}

fn slot(addr: Addr, endpoint: &Endpoint) -> u32 {
    PodSource::slot(endpoint.ifindex, addr.is_v4())
}

#[cfg(test)]
mod tests {
    use dataplane_common::abi::{MacAddr, names::capacity};

    use super::*;
    use crate::{compile, compile::endpoints::PodDevice, datapath::testing::MemoryTable};

    type Slots = MemoryTable<u32, PodSource>;

    fn slots() -> Slots {
        MemoryTable::array("POD_SOURCES", capacity::POD_SOURCES)
    }

    /// The rows of pods, by device index.
    fn rows(pods: &[(u32, &str)]) -> HashMap<Addr, Endpoint> {
        let row = |(ifindex, address): &(u32, &str)| {
            compile::endpoints::pod(&PodDevice {
                addresses: vec![address.parse().unwrap()],
                ifindex: *ifindex,
                mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
                shaped: false,
                down: false,
            })
        };
        pods.iter().flat_map(row).collect()
    }

    fn used(table: &Slots) -> Vec<(u32, String)> {
        let entries = table.entries().unwrap().into_iter();
        let mut used: Vec<_> = entries
            .filter(|(_, source)| source.ifindex != 0)
            .map(|(_, source)| (source.ifindex, source.addr.to_ip().to_string()))
            .collect();
        used.sort();
        used
    }

    #[test]
    fn slots_follow_the_rows() {
        let table = slots();
        let mut sources = PodSources::new(Box::new(table.clone()));
        let pods = rows(&[(7, "10.1.0.7"), (7, "fd00::7"), (8, "10.1.0.8")]);
        for (addr, endpoint) in &pods {
            sources.set(*addr, endpoint).unwrap();
        }
        let expected = [(7, "10.1.0.7"), (7, "fd00::7"), (8, "10.1.0.8")].map(|(i, a)| (i, a.to_owned()));
        assert_eq!(used(&table), expected);
        let addr = Addr::from("10.1.0.7".parse::<std::net::IpAddr>().unwrap());
        assert_eq!(sources.clear(addr, &pods[&addr]).unwrap(), Some(PodSource::slot(7, true)));
        assert_eq!(used(&table), expected[1..]);
    }

    #[test]
    fn slot_that_two_devices_share_goes_to_the_other_when_it_is_free() {
        let table = slots();
        let other = 7 + capacity::POD_SOURCES / 2;
        let mut sources = PodSources::new(Box::new(table.clone()));
        let both = rows(&[(7, "10.1.0.7"), (other, "10.1.0.8")]);
        sources.repair(&both).unwrap();
        assert_eq!(used(&table).len(), 1);
        let before = table.writes();
        assert_eq!(sources.repair(&both).unwrap(), 0);
        assert_eq!(table.writes(), before, "the slot changed hands");
        // whichever has it
        let (holder, waiting) = match used(&table)[0].0 {
            7 => ("10.1.0.7", other),
            _ => ("10.1.0.8", 7),
        };
        let mut left = both;
        let addr = Addr::from(holder.parse::<std::net::IpAddr>().unwrap());
        let row = left.remove(&addr).unwrap();
        let slot = sources.clear(addr, &row).unwrap().unwrap();
        let addr = PodSources::waiting(slot, &left).unwrap();
        sources.set(addr, &left[&addr]).unwrap();
        assert_eq!(used(&table)[0].0, waiting);
    }

    #[test]
    fn slots_of_an_earlier_agent_are_adopted_and_stale_ones_cleared() {
        let mut table = slots();
        PodSources::new(Box::new(table.clone())).repair(&rows(&[(7, "10.1.0.7"), (8, "10.1.0.8")])).unwrap();
        let mut sources = PodSources::new(Box::new(table.clone()));
        // the address moved to another device
        let now = rows(&[(9, "10.1.0.7"), (8, "10.1.0.8")]);
        sources.repair(&now).unwrap();
        let expected = [(8, "10.1.0.8".to_owned()), (9, "10.1.0.7".to_owned())];
        assert_eq!(used(&table), expected);
        // tampered with
        table.remove(&PodSource::slot(8, true)).unwrap();
        let forged = PodSource { addr: *now.keys().next().unwrap(), ifindex: 3 };
        table.insert(&PodSource::slot(3, true), &forged).unwrap();
        assert_eq!(sources.repair(&now).unwrap(), 2);
        assert_eq!(used(&table), expected);
    }
}
