//! Allocates addresses of the node's pod ranges.
//!
//! Pure: no file, no device, no clock. An address has at most one owner. Allocation is next fit, so
//! that a released address is reused as late as possible: peers may still have connections to its
//! last owner.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use crate::api::views::IpamView;

/// Why no address can be allocated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    #[error("this node has no pod range yet")]
    NoRange,
    #[error("pod range {range} is exhausted: {used} of its {capacity} addresses are in use")]
    Exhausted { range: IpNet, used: u64, capacity: u64 },
    #[error("address {address} is already assigned to {owner}")]
    Taken { address: IpAddr, owner: String },
    #[error("requested address {address} is in use by {owner}")]
    RequestedInUse { address: IpAddr, owner: String },
    #[error("requested address {address} is not a pod address of this node's range {range}")]
    OutOfRange { address: IpAddr, range: IpNet },
    #[error("requested address {address}: this node has no pod range of that address family")]
    NoFamily { address: IpAddr },
}

/// The allocator. An owner is the name of a pod's host device.
#[derive(Clone, Debug, Default)]
pub struct Ipam {
    ranges: Vec<IpNet>,
    owners: BTreeMap<IpAddr, String>,
    /// Last allocated address of each family; the search for the next one starts after it.
    last_v4: Option<IpAddr>,
    last_v6: Option<IpAddr>,
}

impl Ipam {
    /// Sets the ranges, at most one per family. Addresses outside of them keep their owner.
    pub fn set_ranges(&mut self, ranges: &[IpNet]) {
        self.ranges = ranges.iter().map(IpNet::trunc).collect();
    }

    /// Allocates one address of every range, or none: the one in `requested` of that family, else a
    /// free one.
    pub fn allocate(&mut self, owner: &str, requested: &[IpAddr]) -> Result<Vec<IpAddr>, IpamError> {
        if self.ranges.is_empty() {
            return Err(IpamError::NoRange);
        }
        let of_family = |address: &IpAddr, range: &IpNet| address.is_ipv4() == range.addr().is_ipv4();
        if let Some(address) =
            requested.iter().find(|address| !self.ranges.iter().any(|range| of_family(address, range)))
        {
            return Err(IpamError::NoFamily { address: *address });
        }
        let choose = |range: &IpNet| match requested.iter().find(|address| of_family(address, range)) {
            Some(address) => self.check_requested(*address, *range),
            None => self.next_free(*range).ok_or_else(|| self.exhausted(*range)),
        };
        let addresses: Vec<IpAddr> = self.ranges.iter().map(choose).collect::<Result<_, _>>()?;
        for address in &addresses {
            self.set_owner(*address, owner);
        }
        Ok(addresses)
    }

    fn check_requested(&self, address: IpAddr, range: IpNet) -> Result<IpAddr, IpamError> {
        let in_range =
            assignable(range).is_some_and(|(first, last)| (first..=last).contains(&number(address)));
        if !in_range {
            return Err(IpamError::OutOfRange { address, range });
        }
        match self.owners.get(&address) {
            Some(owner) => Err(IpamError::RequestedInUse { address, owner: owner.clone() }),
            None => Ok(address),
        }
    }

    /// Assigns an address that is in use already, for recovery. Call it for the newest owner last:
    /// the search for the next free address starts after the last one assigned.
    pub fn assign(&mut self, address: IpAddr, owner: &str) -> Result<(), IpamError> {
        match self.owners.get(&address) {
            Some(other) if other != owner => Err(IpamError::Taken { address, owner: other.clone() }),
            _ => {
                self.set_owner(address, owner);
                Ok(())
            }
        }
    }

    /// Releases all addresses of an owner.
    pub fn release(&mut self, owner: &str) {
        self.owners.retain(|_, of| of != owner);
    }

    /// Whether the addresses are one of every range, as [`Self::allocate`] returns them.
    pub fn covers(&self, addresses: &[IpAddr]) -> bool {
        addresses.len() == self.ranges.len()
            && self.ranges.iter().all(|range| addresses.iter().any(|address| range.contains(address)))
    }

    /// The ranges, with the numbers of used and free addresses.
    pub fn ranges(&self) -> Vec<IpamView> {
        let view = |range: &IpNet| {
            let (used, capacity) = self.usage(*range);
            IpamView { cidr: *range, used, free: capacity.saturating_sub(used) }
        };
        self.ranges.iter().map(view).collect()
    }

    fn set_owner(&mut self, address: IpAddr, owner: &str) {
        self.owners.insert(address, owner.to_owned());
        match address {
            IpAddr::V4(_) => self.last_v4 = Some(address),
            IpAddr::V6(_) => self.last_v6 = Some(address),
        }
    }

    fn next_free(&self, range: IpNet) -> Option<IpAddr> {
        let (first, last) = assignable(range)?;
        let previous = if range.addr().is_ipv4() { self.last_v4 } else { self.last_v6 };
        let start = match previous.map(number) {
            Some(previous) if (first..last).contains(&previous) => previous + 1,
            _ => first,
        };
        let free = self.first_free(range, start, last);
        free.or_else(|| if start > first { self.first_free(range, first, start - 1) } else { None })
    }

    /// Walks the owned addresses up to the first gap. The cost is that of the longest run of owned
    /// addresses.
    fn first_free(&self, range: IpNet, from: u128, to: u128) -> Option<IpAddr> {
        let mut candidate = from;
        for owned in self.owners.range(address(range, from)..=address(range, to)) {
            if number(*owned.0) != candidate {
                break;
            }
            candidate = candidate.checked_add(1)?;
        }
        (candidate <= to).then(|| address(range, candidate))
    }

    fn exhausted(&self, range: IpNet) -> IpamError {
        let (used, capacity) = self.usage(range);
        IpamError::Exhausted { range, used, capacity }
    }

    /// Numbers of used and of assignable addresses, saturating at `u64::MAX`.
    fn usage(&self, range: IpNet) -> (u64, u64) {
        let Some((first, last)) = assignable(range) else { return (0, 0) };
        let used = self.owners.range(address(range, first)..=address(range, last)).count();
        (used as u64, u64::try_from(last - first).unwrap_or(u64::MAX).saturating_add(1))
    }
}

/// First and last address of a range that a pod can have. Excluded are the network address of IPv4,
/// the subnet-router anycast address of IPv6 (RFC 4291 §2.6.1) and the broadcast address of IPv4.
fn assignable(range: IpNet) -> Option<(u128, u128)> {
    let first = number(range.network()).checked_add(1)?;
    let last = match range {
        IpNet::V4(v4) => u128::from(u32::from(v4.broadcast())).checked_sub(1)?,
        IpNet::V6(v6) => u128::from(v6.broadcast()),
    };
    (first <= last).then_some((first, last))
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The address of that number in the range's address family.
fn address(range: IpNet, number: u128) -> IpAddr {
    match range {
        IpNet::V4(_) => IpAddr::V4((number as u32).into()),
        IpNet::V6(_) => IpAddr::V6(number.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn ipam(ranges: &[&str]) -> Ipam {
        let mut ipam = Ipam::default();
        ipam.set_ranges(&ranges.iter().map(|range| range.parse().unwrap()).collect::<Vec<_>>());
        ipam
    }

    fn texts(addresses: &[IpAddr]) -> Vec<String> {
        addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn requested_address_is_allocated_or_refused_with_a_reason() {
        let mut both = ipam(&["10.1.0.0/24", "fd00:1::/64"]);
        let mut ask = |owner: &str, requested: &[&str]| {
            let requested: Vec<IpAddr> = requested.iter().map(|text| text.parse().unwrap()).collect();
            both.allocate(owner, &requested).map(|got| texts(&got)).map_err(|error| error.to_string())
        };
        assert_eq!(ask("a", &["10.1.0.50"]).unwrap(), ["10.1.0.50", "fd00:1::1"]);
        assert_eq!(ask("b", &["fd00:1::50", "10.1.0.7"]).unwrap(), ["10.1.0.7", "fd00:1::50"]);
        assert!(ask("c", &["10.1.0.50"]).unwrap_err().contains("10.1.0.50 is in use by a"));
        assert!(
            ask("c", &["10.1.1.1"])
                .unwrap_err()
                .contains("not a pod address of this node's range 10.1.0.0/24")
        );
        assert!(ask("c", &["10.1.0.255"]).unwrap_err().contains("not a pod address"));
        // a refused request allocates nothing
        assert_eq!(ask("c", &[]).unwrap(), ["10.1.0.8", "fd00:1::51"]);
        let mut single = ipam(&["10.1.0.0/24"]);
        let error = single.allocate("a", &["fd00::1".parse().unwrap()]).unwrap_err();
        assert_eq!(error, IpamError::NoFamily { address: "fd00::1".parse().unwrap() });
    }

    #[test]
    fn allocation_returns_one_address_per_family() {
        let mut ipam = ipam(&["10.1.0.0/24", "fd00:1::/64"]);
        assert_eq!(texts(&ipam.allocate("a", &[]).unwrap()), ["10.1.0.1", "fd00:1::1"]);
        assert_eq!(texts(&ipam.allocate("b", &[]).unwrap()), ["10.1.0.2", "fd00:1::2"]);
        let used: Vec<_> = ipam.ranges().iter().map(|range| (range.used, range.free)).collect();
        assert_eq!(used, [(2, 252), (2, u64::MAX - 2)]);
    }

    #[test]
    fn released_address_is_reused_last() {
        let mut ipam = ipam(&["10.1.0.0/29"]);
        for owner in ["a", "b", "c"] {
            ipam.allocate(owner, &[]).unwrap();
        }
        ipam.release("a");
        ipam.release("c");
        let order: Vec<_> = ["d", "e", "f", "g", "h"]
            .map(|owner| ipam.allocate(owner, &[]).unwrap()[0].to_string())
            .into_iter()
            .collect();
        assert_eq!(order, ["10.1.0.4", "10.1.0.5", "10.1.0.6", "10.1.0.1", "10.1.0.3"]);
    }

    #[test]
    fn exhausted_range_is_named_and_nothing_of_the_other_family_is_allocated() {
        let mut ipam = ipam(&["fd00::/64", "10.1.0.0/30"]);
        ipam.allocate("a", &[]).unwrap();
        ipam.allocate("b", &[]).unwrap();
        let error = ipam.allocate("c", &[]).unwrap_err();
        assert_eq!(error.to_string(), "pod range 10.1.0.0/30 is exhausted: 2 of its 2 addresses are in use");
        assert_eq!(ipam.ranges()[0].used, 2);
        ipam.release("a");
        assert_eq!(texts(&ipam.allocate("c", &[]).unwrap()), ["fd00::3", "10.1.0.1"]);
    }

    #[test]
    fn range_without_assignable_address_is_exhausted() {
        for range in ["10.1.0.0/32", "10.1.0.0/31", "255.255.255.255/32", "fd00::/128"] {
            let error = ipam(&[range]).allocate("a", &[]).unwrap_err();
            assert!(matches!(error, IpamError::Exhausted { used: 0, capacity: 0, .. }), "{error}");
        }
    }

    #[test]
    fn allocation_stops_at_the_end_of_the_address_space() {
        let mut ipam = ipam(&["ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127"]);
        ipam.allocate("a", &[]).unwrap();
        assert!(ipam.allocate("b", &[]).is_err());
    }

    #[test]
    fn addresses_outside_of_new_ranges_keep_their_owner() {
        let mut ipam = ipam(&["10.1.0.0/24"]);
        let old = ipam.allocate("a", &[]).unwrap();
        ipam.set_ranges(&["10.2.0.0/24".parse().unwrap()]);
        assert!(!ipam.covers(&old));
        assert_eq!(texts(&ipam.allocate("b", &[]).unwrap()), ["10.2.0.1"]);
        assert!(matches!(ipam.assign(old[0], "c"), Err(IpamError::Taken { .. })));
        assert_eq!(ipam.ranges()[0].used, 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u8),
        Release(u8),
        Assign(u8, u8),
        Ranges(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => any::<u8>().prop_map(Step::Allocate),
            3 => any::<u8>().prop_map(Step::Release),
            1 => (any::<u8>(), any::<u8>()).prop_map(|(last, owner)| Step::Assign(last, owner)),
            1 => (0..3u8).prop_map(Step::Ranges),
        ]
    }

    const RANGES: [&[&str]; 3] =
        [&["10.1.0.0/28", "fd00:1::/124"], &["10.1.0.0/29"], &["fd00:2::/125", "10.1.0.8/29"]];

    proptest! {
        /// Compared with a simple model, a map from address to owner: never two owners, never a
        /// leak, and `Exhausted` only if every assignable address is in use.
        #[test]
        fn allocator_agrees_with_a_simple_model(steps in proptest::collection::vec(step(), 0..200)) {
            let mut ipam = ipam(RANGES[0]);
            let mut ranges = RANGES[0];
            let mut model: BTreeMap<IpAddr, String> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Allocate(owner) => match ipam.allocate(&owner.to_string(), &[]) {
                        Ok(addresses) => {
                            prop_assert!(ipam.covers(&addresses));
                            for address in addresses {
                                prop_assert_eq!(model.insert(address, owner.to_string()), None);
                            }
                        }
                        Err(IpamError::Exhausted { range, used, capacity }) => {
                            let all = all_assignable(range);
                            prop_assert!(all.iter().all(|address| model.contains_key(address)));
                            prop_assert_eq!((used, capacity), (all.len() as u64, all.len() as u64));
                        }
                        Err(other) => prop_assert!(false, "{}", other),
                    },
                    Step::Release(owner) => {
                        ipam.release(&owner.to_string());
                        model.retain(|_, of| *of != owner.to_string());
                    }
                    Step::Assign(last, owner) => {
                        let address: IpAddr = [10, 1, 0, last].into();
                        let owner = owner.to_string();
                        let free = model.get(&address).is_none_or(|of| *of == owner);
                        prop_assert_eq!(ipam.assign(address, &owner).is_ok(), free);
                        model.entry(address).or_insert(owner);
                    }
                    Step::Ranges(index) => {
                        ranges = RANGES[usize::from(index)];
                        let parsed: Vec<_> = ranges.iter().map(|range| range.parse().unwrap()).collect();
                        ipam.set_ranges(&parsed);
                    }
                }
                for (view, range) in ipam.ranges().iter().zip(ranges) {
                    let all = all_assignable(range.parse().unwrap());
                    let used = all.iter().filter(|address| model.contains_key(address)).count() as u64;
                    prop_assert_eq!((view.used, view.free), (used, all.len() as u64 - used));
                }
            }
        }
    }

    fn all_assignable(range: IpNet) -> BTreeSet<IpAddr> {
        let mut all: BTreeSet<IpAddr> = range.hosts().collect();
        // `IpNet::hosts` includes the subnet-router anycast address of IPv6
        all.remove(&range.network());
        all
    }
}
