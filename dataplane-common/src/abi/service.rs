//! Services: `SERVICES`, `BACKENDS`, `BACKEND_GENERATIONS` map frontends to backends;
//! `SOURCE_RANGES` and `AFFINITY` hold the clients that are allowed, and the backends they had
//! last.
//!
//! A service's backends are one contiguous range of `BACKENDS`. An update writes a new range, then
//! replaces the row of `SERVICES`, so that a reader sees the old list or the new one, never a
//! mixture. User space re-uses the slots of the old range only after every program that could have
//! read the old row has ended. The kernel re-uses the memory of a removed row at once
//! (kernel/bpf/hashtab.c), so the datapath copies a row; its checksum tells whether the copy is
//! whole and belongs to the key that was looked up.
//!
//! `BACKEND_GENERATIONS[id]` is odd while the number is assigned to a backend of a service and even
//! while it is free: assigning and releasing a number each add one, so that the generation in a
//! flow never matches a later backend's.

use super::{Addr, Port};
use crate::{abi, net::Protocol};

abi! {
    /// Key of `SERVICES`: one frontend.
    pub struct ServiceKey: 20 {
        /// Cluster IP, load balancer or external IP, or an address of the host. The unspecified
        /// address of a family: every address of the node that serves node ports
        /// ([`EndpointFlags::NODE_PORTS`](super::EndpointFlags::NODE_PORTS)).
        pub addr: Addr,
        /// Service port or node port. 0: the row is about the address ([`ServiceKey::of_address`],
        /// [`ServiceKey::of_ping`]).
        pub port: Port,
        /// IP protocol number (6, 17, 132); 0, 1 or 58 with port 0.
        pub protocol: u8,
        /// A [`Scope`].
        pub scope: u8,
    }

    /// Value of `SERVICES`.
    pub struct Service: 28 {
        /// Number of the service port, the same for all its frontends; identifies it in flows and
        /// affinity.
        pub id: u32,
        /// First slot of its range in `BACKENDS`. Without [`ServiceFlags::HASH`] the slots are
        /// sorted by [`BackendSlot::id`].
        pub first_slot: u32,
        /// Number of slots; 0 means that no backend is ready.
        pub count: u32,
        /// `sessionAffinity: ClientIP` timeout in seconds, 0 for none (1 to 86,400).
        pub affinity_timeout: u32,
        /// Incremented with every change of the backends.
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
        /// Stable number of this backend of the service; index into `BACKEND_GENERATIONS`.
        pub id: u32,
        /// Value of `BACKEND_GENERATIONS[id]` when this slot was written.
        pub generation: u32,
        /// Target port.
        pub port: Port,
        /// Must be 0.
        pub reserved: u16,
    }

    /// Key of `SOURCE_RANGES`, an LPM trie: a client of a service. The prefix covers all of
    /// `service_id`.
    pub struct SourceRange: 20 {
        /// [`Service::id`].
        pub service_id: u32,
        /// Address or prefix of the client.
        pub addr: Addr,
    }

    /// Key of `AFFINITY`, an LRU hash: a client of a service with session affinity.
    pub struct AffinityKey: 20 {
        /// [`Service::id`].
        pub service_id: u32,
        /// Address of the client; for a host process the node's.
        pub client: Addr,
    }

    /// Value of `AFFINITY`: the backend this client had last.
    pub struct Affinity: 8 {
        /// [`BackendSlot::id`].
        pub backend_id: u32,
        /// Seconds of `CLOCK_MONOTONIC` of the client's last connection.
        pub last_used: u32,
    }
}

impl ServiceKey {
    /// The key of the row that marks an address as a cluster IP, so that packets to its other ports
    /// are rejected.
    #[inline(always)]
    pub const fn of_address(addr: Addr) -> Self {
        Self { addr, port: Port::new(0), protocol: 0, scope: Scope::Any as u8 }
    }

    /// The key of the row that says that pings to an external IP or load balancer address are
    /// answered ([`ServiceFlags::READY`]): several Services may share such an address. Cluster IPs
    /// have the flag in the row [`of_address`](Self::of_address).
    #[inline(always)]
    pub const fn of_ping(addr: Addr) -> Self {
        let protocol = if addr.is_v4() { Protocol::ICMP } else { Protocol::ICMPV6 };
        Self { addr, port: Port::new(0), protocol, scope: Scope::Any as u8 }
    }

    /// The key of the same port on every address of the node that serves node ports, of the same
    /// family.
    #[must_use]
    #[inline(always)]
    pub const fn at_node(mut self) -> Self {
        self.addr = if self.addr.is_v4() { Addr::v4([0; 4]) } else { Addr::UNSPECIFIED };
        self
    }
}

/// Multiplier of the row checksum. Odd, so that the product loses no bits: the golden ratio's
/// digits (Knuth, TAOCP 6.4).
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

impl Service {
    /// The checksum of this row at `key`.
    #[inline(always)]
    pub const fn checksum_for(&self, key: &ServiceKey) -> u32 {
        let port = (key.port.wire() as u32) << 16 | (key.protocol as u32) << 8 | key.scope as u32;
        let [a, b, c, d] = key.addr.words();
        let Self { id, first_slot, count, affinity_timeout, generation, flags, checksum: _ } = *self;
        let words = [a, b, c, d, port, id, first_slot, count, affinity_timeout, generation, flags];
        let mut sum = 0;
        let mut next = 0;
        while next < words.len() {
            sum = (sum ^ words[next] as u64).wrapping_mul(MULTIPLIER);
            next += 1;
        }
        (sum >> 32) as u32
    }

    /// The same row with its checksum for `key`.
    #[must_use]
    pub const fn with_checksum(mut self, key: &ServiceKey) -> Self {
        self.checksum = self.checksum_for(key);
        self
    }

    /// Whether the row is whole and belongs to `key`.
    #[inline(always)]
    pub const fn is_intact(&self, key: &ServiceKey) -> bool {
        self.checksum == self.checksum_for(key)
    }
}

/// Which clients a row applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Scope {
    /// All clients; if there is a row of [`Scope::Outside`] too, only pods and processes of this
    /// node.
    Any = 0,
    /// Clients outside of this node ([`ServiceFlags::OUTSIDE`]).
    Outside = 1,
}

/// Bits of [`Service::flags`].
#[derive(Clone, Copy, Debug)]
pub struct ServiceFlags;

impl ServiceFlags {
    /// Select a backend by the hash of the packet's tuple instead of at random: the range is a
    /// Maglev table.
    pub const HASH: u32 = 1;
    /// Clients outside of this node have a row of their own, under [`Scope::Outside`].
    pub const OUTSIDE: u32 = 2;
    /// Only clients in `SOURCE_RANGES` are allowed.
    pub const SOURCE_RANGES: u32 = 4;
    /// Only backends on this node (`internalTrafficPolicy` or `externalTrafficPolicy: Local`): the
    /// client's address is kept, and without a backend packets are dropped, not rejected.
    pub const LOCAL: u32 = 8;
    /// Not a Service: a pod's `hostPort`.
    pub const HOST_PORT: u32 = 16;
    /// Direct server return: packets from outside are sent on unchanged to the backend's node,
    /// which answers the client. Only with [`ServiceFlags::HASH`], by which both nodes select the
    /// same backend.
    pub const DSR: u32 = 32;
    /// A host process of this node is among the backends: another host process is translated at
    /// `connect()`, because its packets to that backend pass no device hook.
    pub const HOST_BACKEND: u32 = 64;
    /// Only in rows of addresses: a port of the Service has a ready backend at this address.
    pub const READY: u32 = 128;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 32-bit words of a key and its row.
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
        fn row_with_one_word_of_another_is_not_intact(
            words in any::<[u32; WORDS]>(),
            which in 0..WORDS,
            other in 1_u32..,
        ) {
            let (key, row) = read(words);
            let intact = row.with_checksum(&key);
            prop_assert!(intact.is_intact(&key));
            let mut mixed = words;
            mixed[WORDS - 1] = intact.checksum;
            mixed[which] ^= other;
            let (key, row) = read(mixed);
            prop_assert!(!row.is_intact(&key), "{row:?} at {key:?}");
        }
    }
}
