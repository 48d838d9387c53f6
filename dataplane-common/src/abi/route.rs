//! `ROUTES`: longest-prefix match over all addresses that are not of this node.

use super::{Addr, FlowHints};
use crate::abi;

abi! {
    /// Value of `ROUTES`, an LPM trie over [`Addr`] (an IPv4 prefix is 96 bits longer than it is
    /// written).
    pub struct Route: 32 {
        /// Native: the neighbour on the uplink. Overlay: the remote tunnel end.
        pub next_hop: Addr,
        /// Device the packet leaves by: the uplink or the overlay device; 0 for other kinds.
        pub ifindex: u32,
        /// A [`RouteKind`].
        pub kind: u32,
        /// MTU of the path in bytes of IP packet, 0 if unknown.
        pub mtu: u32,
        /// Set for a protocol once the replies of one of its flows go to an address of this prefix:
        /// a client there has connected to a frontend of this node.
        pub flow_hints: FlowHints,
    }
}

/// What happens to a packet to the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RouteKind {
    /// Another node's pods or address, on the same L2: `bpf_redirect_neigh` to `next_hop`.
    Native = 1,
    /// Another node's pods or address, through the VXLAN device.
    Overlay = 2,
    /// Outside the cluster, by the kernel's routes, without masquerade.
    NoMasquerade = 3,
    /// This node's pod CIDR: an address without a row in `ENDPOINTS` is not assigned.
    Local = 4,
    /// The range of cluster IPs (`ServiceCIDR`, KEP-1880): an address without a row in `SERVICES`
    /// is not assigned.
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

    /// Whether it leads to another node or its pods.
    #[inline(always)]
    pub const fn is_node(&self) -> bool {
        matches!(self.kind(), Some(RouteKind::Native | RouteKind::Overlay))
    }

    /// Whether it leads to another node on the same L2, without a tunnel.
    #[inline(always)]
    pub const fn is_native(&self) -> bool {
        matches!(self.kind(), Some(RouteKind::Native))
    }

    /// The same route with all flow hints set: what user space writes over an existing row.
    #[must_use]
    pub const fn with_all_flow_hints(mut self) -> Self {
        self.flow_hints = FlowHints::ALL;
        self
    }

    /// The same route without flow hints, for comparing rows.
    #[must_use]
    pub const fn without_flow_hints(mut self) -> Self {
        self.flow_hints = FlowHints::NONE;
        self
    }
}
