//! `SERVICES`, `BACKENDS`, `BACKEND_GENERATIONS`: frontends and what stands behind them; `SOURCE_RANGES`, `AFFINITY`: who may
//! ask, and whom they got.
//!
//! A service's backends are one contiguous range of `BACKENDS`. An update writes a fresh range, then replaces the
//! entry of `SERVICES`: a reader sees the old list or the new one, never a mixture. User space re-uses the slots of
//! the old range only after every program that could have read the old entry has ended. The kernel waits for nobody before
//! it gives the memory of the old entry to another (kernel/bpf/hashtab.c): an entry is copied, and its checksum tells whether
//! all of the copy is of one entry, and of the one that was looked for.
//!
//! `BACKEND_GENERATIONS[id]` is odd while the number belongs to a backend and even while it is free: giving a number out
//! and taking it back each add one, so that a flow's copy never matches a later owner's.

use super::{Addr, Port};
use crate::abi;

abi! {
    /// Key of `SERVICES`: one frontend.
    pub struct ServiceKey: 20 {
        /// Cluster IP, external IP, or an address of the host. Unspecified, of its family: every address of the node that
        /// takes node ports ([`EndpointFlags::NODE_PORTS`](super::EndpointFlags::NODE_PORTS)).
        pub addr: Addr,
        /// Service port, or node port. 0, with protocol 0: the address as such, which is a cluster IP.
        pub port: Port,
        /// IP protocol number (6, 17, 132).
        pub protocol: u8,
        /// A [`Scope`].
        pub scope: u8,
    }

    /// Value of `SERVICES`.
    pub struct Service: 28 {
        /// Number of the service port, the same for all its frontends; names it in events and flows.
        pub id: u32,
        /// First slot of its range in `BACKENDS`. Without [`ServiceFlags::HASH`] the slots are in the order of
        /// [`BackendSlot::id`].
        pub first_slot: u32,
        /// Number of slots; 0 means that no backend is ready.
        pub count: u32,
        /// `sessionAffinity: ClientIP` timeout in seconds, 0 for none (1 to 86,400).
        pub affinity_timeout: u32,
        /// Raised with every change of the backends.
        pub generation: u32,
        /// Bits of [`ServiceFlags`].
        pub flags: u32,
        /// [`Self::checksum_for`] its key.
        pub checksum: u32,
    }

    /// Value of `BACKENDS`, an array: one slot of a service's range.
    pub struct BackendSlot: 28 {
        /// Address of the pod or host behind the service.
        pub addr: Addr,
        /// Stable number of this (address, port, protocol); index into `BACKEND_GENERATIONS`.
        pub id: u32,
        /// What `BACKEND_GENERATIONS[id]` held when this slot was written.
        pub generation: u32,
        /// Target port.
        pub port: Port,
        /// Must be 0.
        pub reserved: u16,
    }

    /// Key of `SOURCE_RANGES`, an LPM trie: a client of a service. The prefix covers all of `service_id`.
    pub struct SourceRange: 20 {
        /// [`Service::id`].
        pub service_id: u32,
        /// Of the client.
        pub addr: Addr,
    }

    /// Key of `AFFINITY`, an LRU hash: a client of a service with session affinity.
    pub struct AffinityKey: 20 {
        /// [`Service::id`].
        pub service_id: u32,
        /// Of the client; of a host process: the node's.
        pub client: Addr,
    }

    /// Value of `AFFINITY`: the backend this client had last.
    pub struct Affinity: 8 {
        /// [`BackendSlot::id`].
        pub backend_id: u32,
        /// Seconds of `CLOCK_MONOTONIC` of its last connection.
        pub last_used: u32,
    }
}

impl ServiceKey {
    /// The row that says that an address is a cluster IP: at ports without a row of their own nobody answers.
    #[inline(always)]
    pub const fn of_address(addr: Addr) -> Self {
        Self { addr, port: Port::new(0), protocol: 0, scope: Scope::Any as u8 }
    }

    /// The frontend of a node port, at every address of the node of this one's family.
    #[must_use]
    #[inline(always)]
    pub const fn at_node(mut self) -> Self {
        self.addr = if self.addr.is_v4() { Addr::v4([0; 4]) } else { Addr::UNSPECIFIED };
        self
    }
}

/// Odd, so that no word is lost in a product, and without a pattern: the golden ratio's digits (Knuth, TAOCP 6.4).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Service {
    /// What [`Self::checksum`] is in the row of this key.
    #[inline(always)]
    pub const fn checksum_for(&self, key: &ServiceKey) -> u32 {
        let port = (key.port.wire() as u32) << 16 | (key.protocol as u32) << 8 | key.scope as u32;
        let [a, b, c, d] = key.addr.words();
        let Self { id, first_slot, count, affinity_timeout, generation, flags, checksum: _ } = *self;
        let words = [a, b, c, d, port, id, first_slot, count, affinity_timeout, generation, flags];
        let mut sum = 0;
        let mut next = 0;
        while next < words.len() {
            sum = (sum ^ words[next] as u64).wrapping_mul(SPREAD);
            next += 1;
        }
        (sum >> 32) as u32
    }

    /// As it is written for this key.
    #[must_use]
    pub const fn with_checksum(mut self, key: &ServiceKey) -> Self {
        self.checksum = self.checksum_for(key);
        self
    }

    /// Whether it is a whole row, and this key's.
    #[inline(always)]
    pub const fn is_intact(&self, key: &ServiceKey) -> bool {
        self.checksum == self.checksum_for(key)
    }
}

/// Who a frontend is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Scope {
    /// Everyone; where there is a row of [`Scope::Outside`] too, pods and processes of this node.
    Any = 0,
    /// Who asks from outside of this node ([`ServiceFlags::OUTSIDE`]).
    Outside = 1,
}

/// Bits of [`Service::flags`].
#[derive(Clone, Copy, Debug)]
pub struct ServiceFlags;

impl ServiceFlags {
    /// Select by the hash of the packet's tuple (the range is a Maglev table) instead of at random.
    pub const HASH: u32 = 1;
    /// Clients from outside of this node have a row of their own, under [`Scope::Outside`].
    pub const OUTSIDE: u32 = 2;
    /// Only clients in `SOURCE_RANGES` may ask.
    pub const SOURCE_RANGES: u32 = 4;
    /// The backends are those on this node (`internalTrafficPolicy` or `externalTrafficPolicy: Local`): the client's
    /// address is kept, and without a backend packets are dropped, not refused.
    pub const LOCAL: u32 = 8;
    /// Not of a Service: a pod's port of its node (`hostPort`).
    pub const HOST_PORT: u32 = 16;
    /// Direct server return: what comes from outside goes on to its backend's node as it came, and that node answers. Only
    /// with [`ServiceFlags::HASH`], by which both nodes choose the same backend.
    pub const DSR: u32 = 32;
    /// A process of this node is among the backends: another one reaches it through its socket alone, because packets to it
    /// never leave the stack.
    pub const HOST_BACKEND: u32 = 64;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of a row and its key, as a reader finds them.
    const WORDS: usize = (size_of::<ServiceKey>() + size_of::<Service>()) / 4;

    fn read(words: [u32; WORDS]) -> (ServiceKey, Service) {
        let [a, b, c, d, port, id, first_slot, count, affinity_timeout, generation, flags, checksum] = words;
        let [high, low, protocol, scope] = port.to_be_bytes();
        let key = ServiceKey {
            addr: Addr::v6_words([a, b, c, d]),
            port: Port::new(u16::from_be_bytes([high, low])),
            protocol,
            scope,
        };
        (key, Service { id, first_slot, count, affinity_timeout, generation, flags, checksum })
    }

    proptest! {
        #[test]
        fn a_row_of_which_one_word_is_anothers_is_not_sealed(
            words in any::<[u32; WORDS]>(),
            which in 0..WORDS,
            other in 1_u32..,
        ) {
            let (key, row) = read(words);
            let sealed = row.with_checksum(&key);
            prop_assert!(sealed.is_intact(&key));
            let mut mixed = words;
            mixed[WORDS - 1] = sealed.checksum;
            mixed[which] ^= other;
            let (key, row) = read(mixed);
            prop_assert!(!row.is_intact(&key), "{row:?} at {key:?}");
        }
    }
}
