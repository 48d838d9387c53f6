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
mod tests;
