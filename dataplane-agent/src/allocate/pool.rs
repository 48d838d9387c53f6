//! The node ranges of one family: which are taken, which rest, which comes next.
//!
//! Pure: knows no node and no clock. A range that is taken need not be one we would give: nodes keep what they have,
//! larger or smaller than the mask of today. Ranges are CIDRs, so any two are apart or one is inside the other; what
//! covers an address is found by asking for each length in use.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Why there is no pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error("node mask /{mask} is shorter than cluster CIDR {cluster}: not one node would fit")]
    MaskTooShort { cluster: IpNet, mask: u8 },
    #[error("node mask /{mask} leaves no room for pods in {cluster}: at most /{longest}")]
    MaskTooLong { cluster: IpNet, mask: u8, longest: u8 },
    #[error("cluster CIDR {0} has bits set after its prefix: {meant} is meant?", meant = .0.trunc())]
    HostBits(IpNet),
}

/// The ranges of one family.
#[derive(Clone, Debug)]
pub struct Pool {
    cluster: IpNet,
    mask: u8,
    /// Ranges in use as (first address, length), with how many hold them: more than one is a conflict we keep.
    taken: BTreeMap<(u128, u8), u32>,
    /// Lengths among them.
    lengths: BTreeMap<u8, u32>,
    /// Given back a moment ago, by when their rest is over.
    resting: BTreeMap<(u128, u8), Instant>,
    /// Where the search goes on: the number of a range.
    next: u128,
    rest: Duration,
}

impl Pool {
    /// Ranges of length `mask` of `cluster`. A range that was given back is not given again for `rest`, if there are
    /// others: routes to it may be on their way out of the other nodes still.
    pub fn new(cluster: IpNet, mask: u8, rest: Duration) -> Result<Self, PoolError> {
        // two addresses of a range are none a pod can have, and a pod needs one
        let longest = cluster.max_prefix_len() - 2;
        if cluster.trunc() != cluster {
            return Err(PoolError::HostBits(cluster));
        }
        if mask < cluster.prefix_len() {
            return Err(PoolError::MaskTooShort { cluster, mask });
        }
        if mask > longest {
            return Err(PoolError::MaskTooLong { cluster, mask, longest });
        }
        Ok(Self {
            cluster,
            mask,
            taken: BTreeMap::new(),
            lengths: BTreeMap::new(),
            resting: BTreeMap::new(),
            next: 0,
            rest,
        })
    }

    pub const fn cluster(&self) -> IpNet {
        self.cluster
    }

    /// How many ranges there are.
    pub fn capacity(&self) -> u128 {
        1 << (self.mask - self.cluster.prefix_len())
    }

    /// How many of them are taken, whole or in part.
    pub fn used(&self) -> u128 {
        let mut used = 0;
        let mut end = None;
        for &(first, length) in self.taken.keys() {
            let last = self.last(first, length);
            if end.is_none_or(|end| first > end) {
                used += 1_u128 << (self.mask - length);
                end = Some(last);
            }
        }
        used
    }

    /// Whether the range belongs here: of this family and inside the cluster's.
    pub fn contains(&self, range: &IpNet) -> bool {
        self.cluster.contains(range)
    }

    /// Takes a range somebody has already. Ranges outside of the cluster's are not ours to count.
    pub fn take(&mut self, range: &IpNet) {
        let Some(block) = self.block(range) else { return };
        *self.taken.entry(block).or_default() += 1;
        *self.lengths.entry(block.1).or_default() += 1;
        self.resting.remove(&block);
        // after a restart nobody knows what was given last; the highest is the best guess
        self.next = self.next.max(self.number(self.last(block.0, block.1)) + 1) % self.capacity();
    }

    /// Gives back what [`Self::take`] or [`Self::give`] took.
    pub fn give_back(&mut self, range: &IpNet, now: Instant) {
        let Some(block) = self.block(range) else { return };
        let Some(holders) = self.taken.get_mut(&block) else { return };
        *holders -= 1;
        if *holders == 0 {
            self.taken.remove(&block);
            self.resting.insert(block, now + self.rest);
        }
        if let Some(count) = self.lengths.get_mut(&block.1) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&block.1);
            }
        }
    }

    /// The next free range, taken from now on; `None`: there is none left.
    pub fn give(&mut self, now: Instant) -> Option<IpNet> {
        self.resting.retain(|_, until| *until > now);
        let number = self.search(true).or_else(|| self.search(false))?;
        let range = self.range(number);
        self.take(&range);
        self.next = (number + 1) % self.capacity();
        Some(range)
    }

    /// The number of the first range from `next` on, once around, that is free and, if asked, has rested.
    fn search(&self, rested: bool) -> Option<u128> {
        let capacity = self.capacity();
        let resting: BTreeSet<u8> = self.resting.keys().map(|(_, length)| *length).collect();
        let mut passed = 0;
        while passed < capacity {
            let number = (self.next + passed) % capacity;
            let address = self.first(number);
            let taken = self.lengths.keys().filter_map(|&length| self.covers(&self.taken, address, length));
            let rests = resting.iter().filter_map(|&length| self.covers(&self.resting, address, length));
            let covered = if rested { taken.chain(rests).max() } else { taken.max() };
            let Some(last) = covered else { return Some(number) };
            passed += self.number(last) + 1 - number;
        }
        None
    }

    /// The last address of the block of `length` that covers `address`, if there is one.
    fn covers<V>(&self, blocks: &BTreeMap<(u128, u8), V>, address: u128, length: u8) -> Option<u128> {
        let first = address & !self.ones(length);
        blocks.contains_key(&(first, length)).then(|| self.last(first, length))
    }

    /// The whole ranges of ours a range lies in or is made of.
    fn block(&self, range: &IpNet) -> Option<(u128, u8)> {
        if !self.contains(range) {
            return None;
        }
        let length = range.prefix_len().min(self.mask);
        Some((number_of(range.network()) & !self.ones(length), length))
    }

    /// The bits of an address that are not of a prefix of this length.
    fn ones(&self, length: u8) -> u128 {
        let bits = u32::from(self.cluster.max_prefix_len() - length);
        1_u128.checked_shl(bits).map_or(u128::MAX, |beyond| beyond - 1)
    }

    fn last(&self, first: u128, length: u8) -> u128 {
        first | self.ones(length)
    }

    fn first(&self, number: u128) -> u128 {
        number_of(self.cluster.network()) + number * (self.ones(self.mask) + 1)
    }

    fn number(&self, address: u128) -> u128 {
        (address - number_of(self.cluster.network())) / (self.ones(self.mask) + 1)
    }

    fn range(&self, number: u128) -> IpNet {
        let first = self.first(number);
        match self.cluster {
            IpNet::V4(_) => Ipv4Net::new_assert(Ipv4Addr::from_bits(first as u32), self.mask).into(),
            IpNet::V6(_) => Ipv6Net::new_assert(Ipv6Addr::from_bits(first), self.mask).into(),
        }
    }
}

fn number_of(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REST: Duration = Duration::from_secs(60);

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn pool(cluster: &str, mask: u8) -> Pool {
        Pool::new(net(cluster), mask, REST).unwrap()
    }

    #[test]
    fn ranges_come_one_after_the_other_until_there_are_no_more() {
        let (mut pool, now) = (pool("10.0.0.0/22", 24), Instant::now());
        let given: Vec<_> = std::iter::from_fn(|| pool.give(now)).collect();
        assert_eq!(given, ["10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/24", "10.0.3.0/24"].map(net));
        assert_eq!((pool.used(), pool.capacity()), (4, 4));
    }

    #[test]
    fn a_range_given_back_rests_while_there_are_others_and_is_used_when_there_are_none() {
        let (mut pool, now) = (pool("10.0.0.0/23", 24), Instant::now());
        pool.give(now);
        pool.give_back(&net("10.0.0.0/24"), now);
        assert_eq!(pool.give(now), Some(net("10.0.1.0/24")));
        assert_eq!(pool.give(now), Some(net("10.0.0.0/24")), "better than a node without a network");
        assert_eq!(pool.give(now), None);
        pool.give_back(&net("10.0.0.0/24"), now);
        assert_eq!(pool.give(now + REST), Some(net("10.0.0.0/24")));
    }

    #[test]
    fn larger_and_smaller_ranges_of_other_times_are_gone_around() {
        let (mut pool, now) = (pool("10.0.0.0/21", 24), Instant::now());
        pool.take(&net("10.0.2.0/23"));
        pool.take(&net("10.0.4.128/25"));
        pool.take(&net("192.168.0.0/24"));
        assert_eq!(pool.used(), 3);
        let given: Vec<_> = std::iter::from_fn(|| pool.give(now)).collect();
        let left = ["10.0.5.0/24", "10.0.6.0/24", "10.0.7.0/24", "10.0.0.0/24", "10.0.1.0/24"];
        assert_eq!(given, left.map(net));
    }

    #[test]
    fn a_range_held_twice_is_free_when_both_have_given_it_back() {
        let (mut pool, now) = (pool("10.0.0.0/24", 24), Instant::now());
        pool.take(&net("10.0.0.0/24"));
        pool.take(&net("10.0.0.0/24"));
        pool.give_back(&net("10.0.0.0/24"), now);
        assert_eq!(pool.give(now), None);
        pool.give_back(&net("10.0.0.0/24"), now);
        assert!(pool.give(now).is_some());
    }

    #[test]
    fn a_pool_of_ipv6_may_have_more_ranges_than_anyone_could_list() {
        let (mut pool, now) = (pool("fd00::/16", 64), Instant::now());
        assert_eq!(pool.capacity(), 1 << 48);
        pool.take(&net("fd00::/20"));
        assert_eq!(pool.give(now), Some(net("fd00:1000::/64")));
        assert_eq!(pool.give(now), Some(net("fd00:1000:0:1::/64")));
    }

    #[test]
    fn masks_that_cannot_be_are_refused_with_both_values() {
        let refused = |cluster: &str, mask| Pool::new(net(cluster), mask, REST).unwrap_err().to_string();
        assert_eq!(
            refused("10.0.0.0/24", 16),
            "node mask /16 is shorter than cluster CIDR 10.0.0.0/24: not one node would fit"
        );
        assert_eq!(
            refused("10.0.0.0/24", 31),
            "node mask /31 leaves no room for pods in 10.0.0.0/24: at most /30"
        );
        assert_eq!(
            refused("10.0.0.1/24", 26),
            "cluster CIDR 10.0.0.1/24 has bits set after its prefix: 10.0.0.0/24 is meant?"
        );
    }

    #[derive(Clone, Debug)]
    enum Step {
        Give,
        /// One of those held.
        GiveBack(usize),
        /// Address within the cluster's range, and a length.
        Take(u32, u8),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Give),
            2 => (0..64_usize).prop_map(Step::GiveBack),
            1 => (0..1_u32 << 12, 21..=28_u8).prop_map(|(address, length)| Step::Take(address, length)),
            1 => (0..90_u64).prop_map(Step::Wait),
        ]
    }

    fn overlap(one: &IpNet, other: &IpNet) -> bool {
        one.contains(other) || other.contains(one)
    }

    proptest! {
        #[test]
        fn what_is_given_overlaps_nothing_held_and_none_is_refused_while_there_is_room(
            steps in proptest::collection::vec(step(), 0..200),
            seed in 0..16_u128,
        ) {
            let mut pool = pool("10.0.0.0/20", 24);
            pool.next = seed;
            let mut now = Instant::now();
            let mut held: Vec<IpNet> = Vec::new();
            let all: Vec<IpNet> = net("10.0.0.0/20").subnets(24).unwrap().collect();
            for step in steps {
                match step {
                    Step::Give => match pool.give(now) {
                        Some(given) => {
                            prop_assert!(all.contains(&given));
                            prop_assert!(!held.iter().any(|other| overlap(&given, other)), "{given} of {held:?}");
                            held.push(given);
                        }
                        None => prop_assert!(all.iter().all(|one| held.iter().any(|other| overlap(one, other)))),
                    },
                    Step::GiveBack(which) if !held.is_empty() => {
                        let range = held.swap_remove(which % held.len());
                        pool.give_back(&range, now);
                    }
                    Step::GiveBack(_) => {}
                    Step::Take(address, length) => {
                        let base = Ipv4Addr::from_bits(u32::from_be_bytes([10, 0, 0, 0]) + address);
                        let range = IpNet::new(base.into(), length).unwrap().trunc();
                        pool.take(&range);
                        held.push(range);
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds),
                }
                let used = all.iter().filter(|one| held.iter().any(|other| overlap(one, other))).count();
                prop_assert_eq!(pool.used(), used as u128);
            }
            for range in held {
                pool.give_back(&range, now);
            }
            prop_assert_eq!(pool.used(), 0);
        }
    }
}
