//! Which addresses of the node's pod ranges are whose.
//!
//! Pure: no file, no device, no clock. An address has at most one owner. Addresses are handed out in turn (next fit),
//! so that one which was given back rests as long as the range allows: peers may still believe in its last owner.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use crate::api::views::IpamView;

/// Why there is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    #[error("this node has no pod range yet")]
    NoRange,
    #[error("pod range {range} is exhausted: {used} of its {capacity} addresses are in use")]
    Exhausted { range: IpNet, used: u64, capacity: u64 },
    #[error("{address} belongs to {owner}")]
    Taken { address: IpAddr, owner: String },
    #[error("the address the pod asks for, {address}, is in use by {owner}")]
    Wanted { address: IpAddr, owner: String },
    #[error("the address the pod asks for, {address}, is not a pod's in this node's range {range}")]
    OutOfRange { address: IpAddr, range: IpNet },
    #[error("the address the pod asks for, {address}, is of a family this node has no range of")]
    NoFamily { address: IpAddr },
}

/// The allocator. Owners are named by the host's side of their device.
#[derive(Clone, Debug, Default)]
pub struct Ipam {
    ranges: Vec<IpNet>,
    owners: BTreeMap<IpAddr, String>,
    /// The last address given of each family: the next one is after it.
    last_v4: Option<IpAddr>,
    last_v6: Option<IpAddr>,
}

impl Ipam {
    /// From now on addresses come from these ranges, one of each. Those that are owned stay so, wherever they are from.
    pub fn set_ranges(&mut self, ranges: &[IpNet]) {
        self.ranges = ranges.iter().map(IpNet::trunc).collect();
    }

    /// An address of every range, or none at all: the one of its family in `wanted`, else any.
    pub fn allocate(&mut self, owner: &str, wanted: &[IpAddr]) -> Result<Vec<IpAddr>, IpamError> {
        if self.ranges.is_empty() {
            return Err(IpamError::NoRange);
        }
        let of_family = |address: &IpAddr, range: &IpNet| address.is_ipv4() == range.addr().is_ipv4();
        if let Some(address) =
            wanted.iter().find(|address| !self.ranges.iter().any(|range| of_family(address, range)))
        {
            return Err(IpamError::NoFamily { address: *address });
        }
        let pick = |range: &IpNet| match wanted.iter().find(|address| of_family(address, range)) {
            Some(address) => self.grant(*address, *range),
            None => self.pick(*range).ok_or_else(|| self.exhausted(*range)),
        };
        let addresses: Vec<IpAddr> = self.ranges.iter().map(pick).collect::<Result<_, _>>()?;
        for address in &addresses {
            self.own(*address, owner);
        }
        Ok(addresses)
    }

    fn grant(&self, address: IpAddr, range: IpNet) -> Result<IpAddr, IpamError> {
        let possible = bounds(range).is_some_and(|(first, last)| (first..=last).contains(&number(address)));
        if !possible {
            return Err(IpamError::OutOfRange { address, range });
        }
        match self.owners.get(&address) {
            Some(owner) => Err(IpamError::Wanted { address, owner: owner.clone() }),
            None => Ok(address),
        }
    }

    /// DeletionQueue who has an address already. The newest owner comes last: new addresses are looked for after his.
    pub fn claim(&mut self, address: IpAddr, owner: &str) -> Result<(), IpamError> {
        match self.owners.get(&address) {
            Some(other) if other != owner => Err(IpamError::Taken { address, owner: other.clone() }),
            _ => {
                self.own(address, owner);
                Ok(())
            }
        }
    }

    /// Gives back everything of an owner.
    pub fn release(&mut self, owner: &str) {
        self.owners.retain(|_, of| of != owner);
    }

    /// Whether the addresses are what [`Self::allocate`] would give: one of every range.
    pub fn covers(&self, addresses: &[IpAddr]) -> bool {
        addresses.len() == self.ranges.len()
            && self.ranges.iter().all(|range| addresses.iter().any(|address| range.contains(address)))
    }

    /// The ranges and their use.
    pub fn ranges(&self) -> Vec<IpamView> {
        let view = |range: &IpNet| {
            let (used, capacity) = self.usage(*range);
            IpamView { cidr: *range, used, free: capacity.saturating_sub(used) }
        };
        self.ranges.iter().map(view).collect()
    }

    fn own(&mut self, address: IpAddr, owner: &str) {
        self.owners.insert(address, owner.to_owned());
        match address {
            IpAddr::V4(_) => self.last_v4 = Some(address),
            IpAddr::V6(_) => self.last_v6 = Some(address),
        }
    }

    fn pick(&self, range: IpNet) -> Option<IpAddr> {
        let (first, last) = bounds(range)?;
        let given = if range.addr().is_ipv4() { self.last_v4 } else { self.last_v6 };
        let start = match given.map(number) {
            Some(given) if (first..last).contains(&given) => given + 1,
            _ => first,
        };
        let free = self.first_free(range, start, last);
        free.or_else(|| if start > first { self.first_free(range, first, start - 1) } else { None })
    }

    /// Walks along the owned addresses until there is a gap: the cost is that of the densest stretch, not of the range.
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

    /// Addresses in use and addresses there are, up to what a `u64` holds.
    fn usage(&self, range: IpNet) -> (u64, u64) {
        let Some((first, last)) = bounds(range) else { return (0, 0) };
        let used = self.owners.range(address(range, first)..=address(range, last)).count();
        (used as u64, u64::try_from(last - first).unwrap_or(u64::MAX).saturating_add(1))
    }
}

/// First and last address of a range that a pod can have. The first of all is the network's own name (IPv4) or that of
/// its routers (IPv6, RFC 4291 §2.6.1), the last of IPv4 is everybody.
fn bounds(range: IpNet) -> Option<(u128, u128)> {
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

/// The address of that number in the range's family.
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
    fn a_pod_gets_the_address_it_asks_for_or_hears_why_not() {
        let mut both = ipam(&["10.1.0.0/24", "fd00:1::/64"]);
        let mut ask = |owner: &str, wanted: &[&str]| {
            let wanted: Vec<IpAddr> = wanted.iter().map(|text| text.parse().unwrap()).collect();
            both.allocate(owner, &wanted).map(|got| texts(&got)).map_err(|error| error.to_string())
        };
        assert_eq!(ask("a", &["10.1.0.50"]).unwrap(), ["10.1.0.50", "fd00:1::1"]);
        assert_eq!(ask("b", &["fd00:1::50", "10.1.0.7"]).unwrap(), ["10.1.0.7", "fd00:1::50"]);
        assert!(ask("c", &["10.1.0.50"]).unwrap_err().contains("10.1.0.50, is in use by a"));
        assert!(
            ask("c", &["10.1.1.1"]).unwrap_err().contains("not a pod's in this node's range 10.1.0.0/24")
        );
        assert!(ask("c", &["10.1.0.255"]).unwrap_err().contains("not a pod's"));
        // nothing was taken on the way to a refusal
        assert_eq!(ask("c", &[]).unwrap(), ["10.1.0.8", "fd00:1::51"]);
        let mut single = ipam(&["10.1.0.0/24"]);
        let error = single.allocate("a", &["fd00::1".parse().unwrap()]).unwrap_err();
        assert_eq!(error, IpamError::NoFamily { address: "fd00::1".parse().unwrap() });
    }

    #[test]
    fn both_families_come_in_pairs() {
        let mut ipam = ipam(&["10.1.0.0/24", "fd00:1::/64"]);
        assert_eq!(texts(&ipam.allocate("a", &[]).unwrap()), ["10.1.0.1", "fd00:1::1"]);
        assert_eq!(texts(&ipam.allocate("b", &[]).unwrap()), ["10.1.0.2", "fd00:1::2"]);
        let used: Vec<_> = ipam.ranges().iter().map(|range| (range.used, range.free)).collect();
        assert_eq!(used, [(2, 252), (2, u64::MAX - 2)]);
    }

    #[test]
    fn an_address_rests_until_its_turn_comes() {
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
    fn an_exhausted_range_is_named_and_costs_the_other_family_nothing() {
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
    fn a_range_without_room_for_a_pod_is_exhausted_from_the_start() {
        for range in ["10.1.0.0/32", "10.1.0.0/31", "255.255.255.255/32", "fd00::/128"] {
            let error = ipam(&[range]).allocate("a", &[]).unwrap_err();
            assert!(matches!(error, IpamError::Exhausted { used: 0, capacity: 0, .. }), "{error}");
        }
    }

    #[test]
    fn the_end_of_all_addresses_is_an_end() {
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
        assert!(matches!(ipam.claim(old[0], "c"), Err(IpamError::Taken { .. })));
        assert_eq!(ipam.ranges()[0].used, 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u8),
        Release(u8),
        Claim(u8, u8),
        Ranges(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => any::<u8>().prop_map(Step::Allocate),
            3 => any::<u8>().prop_map(Step::Release),
            1 => (any::<u8>(), any::<u8>()).prop_map(|(last, owner)| Step::Claim(last, owner)),
            1 => (0..3u8).prop_map(Step::Ranges),
        ]
    }

    const RANGES: [&[&str]; 3] =
        [&["10.1.0.0/28", "fd00:1::/124"], &["10.1.0.0/29"], &["fd00:2::/125", "10.1.0.8/29"]];

    proptest! {
        /// Against a plain model (a map from address to owner): never two owners, never a leak, and "exhausted" only if
        /// every address a pod can have is in use.
        #[test]
        fn never_two_owners_and_never_a_leak(steps in proptest::collection::vec(step(), 0..200)) {
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
                            let all = usable(range);
                            prop_assert!(all.iter().all(|address| model.contains_key(address)));
                            prop_assert_eq!((used, capacity), (all.len() as u64, all.len() as u64));
                        }
                        Err(other) => prop_assert!(false, "{}", other),
                    },
                    Step::Release(owner) => {
                        ipam.release(&owner.to_string());
                        model.retain(|_, of| *of != owner.to_string());
                    }
                    Step::Claim(last, owner) => {
                        let address: IpAddr = [10, 1, 0, last].into();
                        let owner = owner.to_string();
                        let free = model.get(&address).is_none_or(|of| *of == owner);
                        prop_assert_eq!(ipam.claim(address, &owner).is_ok(), free);
                        model.entry(address).or_insert(owner);
                    }
                    Step::Ranges(index) => {
                        ranges = RANGES[usize::from(index)];
                        let parsed: Vec<_> = ranges.iter().map(|range| range.parse().unwrap()).collect();
                        ipam.set_ranges(&parsed);
                    }
                }
                for (view, range) in ipam.ranges().iter().zip(ranges) {
                    let all = usable(range.parse().unwrap());
                    let used = all.iter().filter(|address| model.contains_key(address)).count() as u64;
                    prop_assert_eq!((view.used, view.free), (used, all.len() as u64 - used));
                }
            }
        }
    }

    fn usable(range: IpNet) -> BTreeSet<IpAddr> {
        let mut all: BTreeSet<IpAddr> = range.hosts().collect();
        // what the crate counts as host of IPv6 includes the routers' address
        all.remove(&range.network());
        all
    }
}
