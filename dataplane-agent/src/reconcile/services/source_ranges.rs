//! Reconciles `SOURCE_RANGES`: the clients allowed at load balancer addresses.
//!
//! A range is written before a row of `SERVICES` refers to ranges, and removed afterwards. A
//! temporary extra range allows what was allowed before; a missing one would reject allowed
//! clients.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
};

use dataplane_common::abi::{Addr, SourceRange};
use ipnet::IpNet;

use crate::{
    datapath::table::{SourcePrefix, Table, TableError},
    reconcile::instrumented::InstrumentedTable,
};

/// Prefix bits before the address: the service ID.
const ID_BITS: u32 = u32::BITS;
/// IPv4-mapped addresses start with this many zero bits; the only other addresses there that could
/// occur, `::` and `::1`, are never clients.
const MAPPED_ZERO_BITS: u8 = 16;

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
        for prefix in ranges.iter().flat_map(|range| prefixes(id, range)) {
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
        let desired: BTreeSet<_> = ranges.iter().flat_map(|range| prefixes(id, range)).collect();
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

/// Converts a range to table keys. IPv4 addresses are IPv4-mapped there: an IPv6 range that
/// contains them is split to exclude them.
fn prefixes(service_id: u32, range: &IpNet) -> Vec<SourcePrefix> {
    let prefix = |network: IpAddr, bits: u32| SourcePrefix {
        range: SourceRange { service_id, addr: Addr::from(network) },
        bits: ID_BITS + bits,
    };
    match range {
        IpNet::V4(v4) => {
            vec![prefix(v4.network().into(), Addr::V4_PREFIX_BITS + u32::from(v4.prefix_len()))]
        }
        IpNet::V6(v6) if v6.network().to_bits() >> (128 - MAPPED_ZERO_BITS) == 0 => {
            // at each bit, take the half that does not contain them
            let halves = v6.prefix_len() + 1..=MAPPED_ZERO_BITS;
            halves
                .map(|bits| prefix(Ipv6Addr::from_bits(1_u128 << (128 - bits)).into(), bits.into()))
                .collect()
        }
        IpNet::V6(v6) => vec![prefix(v6.network().into(), v6.prefix_len().into())],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of the datapath's lookup.
    fn holds(range: &str, client: &str) -> bool {
        let bits = |addr: Addr| match addr.to_ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let client = bits(client.parse::<IpAddr>().unwrap().into());
        let is_in = |prefix: &SourcePrefix| {
            let differ = (client ^ bits(prefix.range.addr)).leading_zeros();
            prefix.range.service_id == 7 && differ >= prefix.bits - ID_BITS
        };
        prefixes(7, &range.parse().unwrap()).iter().any(is_in)
    }

    #[test]
    fn range_contains_addresses_of_its_family_only() {
        for (range, inside, outside) in [
            ("0.0.0.0/0", vec!["192.0.2.1", "0.0.0.1"], vec!["2001:db8::1", "fd00::1"]),
            ("10.0.0.0/8", vec!["10.1.2.3"], vec!["11.0.0.1", "2001:db8::1"]),
            (
                "::/0",
                vec!["2001:db8::1", "fd00::1", "fe80::1", "64:ff9b::a00:1", "1::"],
                vec!["10.1.2.3", "192.0.2.1"],
            ),
            ("::/1", vec!["2001:db8::1", "64:ff9b::a00:1"], vec!["10.1.2.3", "fd00::1"]),
            ("2000::/3", vec!["2001:db8::1"], vec!["10.1.2.3", "fd00::1"]),
            ("::ffff:0:0/96", vec![], vec!["10.1.2.3"]),
            ("2001:db8::/32", vec!["2001:db8::1"], vec!["2001:db9::1", "10.1.2.3"]),
        ] {
            assert!(inside.iter().all(|client| holds(range, client)), "{range} holds {inside:?}");
            assert!(!outside.iter().any(|client| holds(range, client)), "{range} holds none of {outside:?}");
        }
    }
}
