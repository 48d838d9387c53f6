//! `SERVICES`, `BACKENDS`, `BACKEND_GENERATIONS`: frontends and what stands behind them.
//!
//! A service's backends are one contiguous range of `BACKENDS`. An update writes a fresh range, then replaces the
//! entry of `SERVICES`: a reader sees the old list or the new one, never a mixture. User space re-uses the slots of
//! the old range only after every program that could have read the old entry has ended.
//!
//! `BACKEND_GENERATIONS[id]` is odd while the number belongs to a backend and even while it is free: giving a number out
//! and taking it back each add one, so that a flow's copy never matches a later owner's.

use super::{Addr, Port};
use crate::abi;

abi! {
    /// Key of `SERVICES`: one frontend.
    pub struct ServiceKey: 20 {
        /// Cluster IP, or an address of the host.
        pub addr: Addr,
        /// Service port.
        pub port: Port,
        /// IP protocol number (6, 17).
        pub protocol: u8,
        /// A [`Scope`].
        pub scope: u8,
    }

    /// Value of `SERVICES`.
    pub struct Service: 28 {
        /// Number of the service port, the same for all its frontends; names it in events and flows.
        pub id: u32,
        /// First slot of its range in `BACKENDS`.
        pub first_slot: u32,
        /// Number of slots; 0 means that no backend is ready.
        pub count: u32,
        /// `sessionAffinity: ClientIP` timeout in seconds, 0 for none.
        pub affinity_timeout: u32,
        /// Raised with every change of the backends.
        pub generation: u32,
        /// Bits of [`ServiceFlags`].
        pub flags: u32,
        /// Must be 0.
        pub reserved: u32,
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
}

/// Who a frontend is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Scope {
    /// Everyone.
    Any = 0,
}

/// Bits of [`Service::flags`].
#[derive(Clone, Copy, Debug)]
pub struct ServiceFlags;

impl ServiceFlags {
    /// Select by the hash of the packet's tuple (the range is a Maglev table) instead of at random.
    pub const HASH: u32 = 1;
    /// A frontend on an address of the host (`hostPort`). The packets of the host's own processes to it never leave the
    /// host, so their sockets are translated whatever [`NodeFlags`](super::NodeFlags) say.
    pub const HOST_PORT: u32 = 2;
}
