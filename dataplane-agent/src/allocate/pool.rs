//! The node ranges of one family: which are in use, which wait for reuse, which is next.
//!
//! Pure: knows no node and no clock. A range in use may be larger or smaller than today's mask,
//! because nodes keep their ranges. Ranges are CIDRs: any two are disjoint or nested, so the range
//! that covers an address is found by one lookup per prefix length in use.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Why a pool cannot be created.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error("node mask /{mask} is shorter than cluster CIDR {cluster}: no node range fits")]
    MaskTooShort { cluster: IpNet, mask: u8 },
    #[error("node mask /{mask} leaves no pod addresses in {cluster}: at most /{longest} is allowed")]
    MaskTooLong { cluster: IpNet, mask: u8, longest: u8 },
    #[error("cluster CIDR {0} has bits set after its prefix: did you mean {masked}?", masked = .0.trunc())]
    HostBits(IpNet),
}

/// The ranges of one family.
#[derive(Clone, Debug)]
pub struct Pool {
    cluster: IpNet,
    mask: u8,
    /// Ranges in use as (first address, prefix length), with the number of nodes that have them:
    /// more than one is a conflict.
    in_use: BTreeMap<(u128, u8), u32>,
    /// Prefix lengths in use, with their counts.
    lengths: BTreeMap<u8, u32>,
    /// Recently released ranges, and when they may be reused.
    released: BTreeMap<(u128, u8), Instant>,
    /// Index of the range where the next search starts.
    next: u128,
    reuse_delay: Duration,
}

impl Pool {
    /// Creates a pool of ranges of length `mask` in `cluster`. A released range is not reused for
    /// `reuse_delay` if there are others: other nodes may still have routes to it.
    pub fn new(cluster: IpNet, mask: u8, reuse_delay: Duration) -> Result<Self, PoolError> {
        // two addresses of a range are reserved, and a pod needs one
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
            in_use: BTreeMap::new(),
            lengths: BTreeMap::new(),
            released: BTreeMap::new(),
            next: 0,
            reuse_delay,
        })
    }

    pub const fn cluster(&self) -> IpNet {
        self.cluster
    }

    /// Number of ranges.
    pub fn capacity(&self) -> u128 {
        1 << (self.mask - self.cluster.prefix_len())
    }

    /// Number of ranges in use, fully or partly.
    pub fn used(&self) -> u128 {
        let mut used = 0;
        let mut end = None;
        for &(first, length) in self.in_use.keys() {
            let last = self.last(first, length);
            if end.is_none_or(|end| first > end) {
                used += 1_u128 << (self.mask - length);
                end = Some(last);
            }
        }
        used
    }

    /// Whether the range is inside of the cluster CIDR.
    pub fn contains(&self, range: &IpNet) -> bool {
        self.cluster.contains(range)
    }

    /// Marks a range as in use. Ranges outside of the cluster CIDR are ignored.
    pub fn occupy(&mut self, range: &IpNet) {
        let Some(block) = self.block(range) else { return };
        *self.in_use.entry(block).or_default() += 1;
        *self.lengths.entry(block.1).or_default() += 1;
        self.released.remove(&block);
        // the last allocated range is unknown after a restart; the highest is the best guess
        self.next = self.next.max(self.index(self.last(block.0, block.1)) + 1) % self.capacity();
    }

    /// Releases a range from [`Self::occupy`] or [`Self::allocate`].
    pub fn release(&mut self, range: &IpNet, now: Instant) {
        let Some(block) = self.block(range) else { return };
        let Some(nodes) = self.in_use.get_mut(&block) else { return };
        *nodes -= 1;
        if *nodes == 0 {
            self.in_use.remove(&block);
            self.released.insert(block, now + self.reuse_delay);
        }
        if let Some(count) = self.lengths.get_mut(&block.1) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&block.1);
            }
        }
    }

    /// Allocates the next free range; `None`: the pool is exhausted.
    pub fn allocate(&mut self, now: Instant) -> Option<IpNet> {
        self.released.retain(|_, until| *until > now);
        let index = self.search(true).or_else(|| self.search(false))?;
        let range = self.range(index);
        self.occupy(&range);
        self.next = (index + 1) % self.capacity();
        Some(range)
    }

    /// Index of the first free range from `next` on. `skip_released`: without ranges that wait for
    /// reuse.
    fn search(&self, skip_released: bool) -> Option<u128> {
        let capacity = self.capacity();
        let released: BTreeSet<u8> = self.released.keys().map(|(_, length)| *length).collect();
        let mut skipped = 0;
        while skipped < capacity {
            let index = (self.next + skipped) % capacity;
            let address = self.first(index);
            let in_use = self.lengths.keys().filter_map(|&length| self.covers(&self.in_use, address, length));
            let waiting = released.iter().filter_map(|&length| self.covers(&self.released, address, length));
            let covered = if skip_released { in_use.chain(waiting).max() } else { in_use.max() };
            let Some(last) = covered else { return Some(index) };
            skipped += self.index(last) + 1 - index;
        }
        None
    }

    /// The last address of the block of this prefix length that covers `address`, if it is in
    /// `blocks`.
    fn covers<V>(&self, blocks: &BTreeMap<(u128, u8), V>, address: u128, length: u8) -> Option<u128> {
        let first = address & !self.host_bits(length);
        blocks.contains_key(&(first, length)).then(|| self.last(first, length))
    }

    /// The block of pool ranges that contains a range, or that it consists of.
    fn block(&self, range: &IpNet) -> Option<(u128, u8)> {
        if !self.contains(range) {
            return None;
        }
        let length = range.prefix_len().min(self.mask);
        Some((address_bits(range.network()) & !self.host_bits(length), length))
    }

    /// The host bits of a prefix of this length.
    fn host_bits(&self, length: u8) -> u128 {
        let bits = u32::from(self.cluster.max_prefix_len() - length);
        1_u128.checked_shl(bits).map_or(u128::MAX, |beyond| beyond - 1)
    }

    fn last(&self, first: u128, length: u8) -> u128 {
        first | self.host_bits(length)
    }

    fn first(&self, index: u128) -> u128 {
        address_bits(self.cluster.network()) + index * (self.host_bits(self.mask) + 1)
    }

    fn index(&self, address: u128) -> u128 {
        (address - address_bits(self.cluster.network())) / (self.host_bits(self.mask) + 1)
    }

    fn range(&self, index: u128) -> IpNet {
        let first = self.first(index);
        match self.cluster {
            IpNet::V4(_) => Ipv4Net::new_assert(Ipv4Addr::from_bits(first as u32), self.mask).into(),
            IpNet::V6(_) => Ipv6Net::new_assert(Ipv6Addr::from_bits(first), self.mask).into(),
        }
    }
}

fn address_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests;
