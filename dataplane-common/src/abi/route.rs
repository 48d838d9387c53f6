//! `ROUTES`: longest-prefix match over everything that is not on this node.

use super::{Addr, FlowHints};
use crate::abi;

abi! {
    /// Value of `ROUTES`, an LPM trie over [`Addr`] (an IPv4 prefix is 96 bits longer than it is written).
    pub struct Route: 32 {
        /// [`RouteKind::Native`]: the neighbour on the uplink. [`RouteKind::Overlay`]: the remote tunnel end.
        pub next_hop: Addr,
        /// Device the packet leaves by: the uplink, or the overlay device. 0 where there is none.
        pub ifindex: u32,
        /// A [`RouteKind`].
        pub kind: u32,
        /// MTU of the path in bytes of IP packet, 0 if unknown.
        pub mtu: u32,
        /// Not closed to a protocol once a flow of it has an address behind this prefix as its reply target: a client
        /// there has asked a frontend of this node.
        pub flow_hints: FlowHints,
    }
}

/// What is done with a packet to the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RouteKind {
    /// Another node's pods or address, on the same L2: `bpf_redirect_neigh` to `next_hop`.
    Native = 1,
    /// Another node's pods or address, through the VXLAN device.
    Overlay = 2,
    /// Outside the cluster, by the kernel's routes, without masquerade.
    NoMasquerade = 3,
    /// This node's own pod CIDR: an address without an endpoint does not exist.
    Local = 4,
    /// Cluster IPs come from here (`ServiceCIDR`, KEP-1880): an address without a service does not exist.
    Services = 5,
}

impl Route {
    /// The kind, if it is a known one.
    #[inline(always)]
    pub const fn kind(&self) -> Option<RouteKind> {
        match self.kind {
            1 => Some(RouteKind::Native),
            2 => Some(RouteKind::Overlay),
            3 => Some(RouteKind::NoMasquerade),
            4 => Some(RouteKind::Local),
            5 => Some(RouteKind::Services),
            _ => None,
        }
    }

    /// Whether it leads to another node.
    #[inline(always)]
    pub const fn is_node(&self) -> bool {
        matches!(self.kind(), Some(RouteKind::Native | RouteKind::Overlay))
    }

    /// Whether it leads straight to its node, which is on the same L2.
    #[inline(always)]
    pub const fn is_native(&self) -> bool {
        matches!(self.kind(), Some(RouteKind::Native))
    }

    /// The same route with every gate open: what user space writes over an existing entry.
    #[must_use]
    pub const fn with_all_flow_hints(mut self) -> Self {
        self.flow_hints = FlowHints::ALL;
        self
    }

    /// The same route with every gate closed: what two entries are compared by.
    #[must_use]
    pub const fn without_flow_hints(mut self) -> Self {
        self.flow_hints = FlowHints::NONE;
        self
    }
}
