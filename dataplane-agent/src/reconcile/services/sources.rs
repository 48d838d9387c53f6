//! `SOURCE_RANGES`: who may ask a service at the addresses of its load balancer.
//!
//! A range is there before a row of `SERVICES` says that ranges count, and goes after it. One too many for a moment is what
//! the service allowed until now; one too few would shut out who may ask.

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

/// Bits of a prefix in front of the address: the service's number.
const ID_BITS: u32 = u32::BITS;
/// Addresses of IPv4 are among those that begin with so many zeros, and beside them only `::` and `::1`, which ask nobody.
const MAPPED: u8 = 16;

/// Actual entries.
#[derive(Debug)]
pub(in crate::reconcile) struct Sources {
    pub(in crate::reconcile) table: InstrumentedTable<SourcePrefix, u32>,
    actual: HashMap<u32, BTreeSet<SourcePrefix>>,
}

impl Sources {
    pub(super) fn new(table: Box<dyn Table<SourcePrefix, u32>>) -> Self {
        Self { table: InstrumentedTable::new(table), actual: HashMap::new() }
    }

    pub(super) fn adopt(&mut self) -> Result<(), TableError> {
        for (prefix, _) in self.table.entries()? {
            self.actual.entry(prefix.range.service_id).or_default().insert(prefix);
        }
        Ok(())
    }

    /// Lets these clients in.
    pub(super) fn allow(&mut self, id: u32, ranges: &[IpNet]) -> Result<(), TableError> {
        for prefix in ranges.iter().flat_map(|range| prefixes(id, range)) {
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
        let wanted: BTreeSet<_> = ranges.iter().flat_map(|range| prefixes(id, range)).collect();
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

/// A range as the table has it, in which an address of IPv4 is one of IPv6: a range of IPv6 that would hold those is what is
/// left of it without them.
fn prefixes(service_id: u32, range: &IpNet) -> Vec<SourcePrefix> {
    let prefix = |network: IpAddr, bits: u32| SourcePrefix {
        range: SourceRange { service_id, addr: Addr::from(network) },
        bits: ID_BITS + bits,
    };
    match range {
        IpNet::V4(v4) => {
            vec![prefix(v4.network().into(), Addr::V4_PREFIX_BITS + u32::from(v4.prefix_len()))]
        }
        IpNet::V6(v6) if v6.network().to_bits() >> (128 - MAPPED) == 0 => {
            // on the way to them, at each bit the half they are not in
            let halves = v6.prefix_len() + 1..=MAPPED;
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

    /// What the datapath's lookup says.
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
    fn a_range_holds_addresses_of_its_own_family() {
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
