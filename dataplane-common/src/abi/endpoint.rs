//! `ENDPOINTS`: addresses that live on this node.

use super::{FlowHints, MacAddr};
use crate::abi;

abi! {
    /// Value of `ENDPOINTS`, keyed by [`super::Addr`]: where an address of this node lives.
    pub struct Endpoint: 16 {
        /// Host-side device of the pod; 0 for an address of the host itself.
        pub ifindex: u32,
        /// Address of the device inside the pod.
        pub mac: MacAddr,
        /// Bits of [`EndpointFlags`].
        pub flags: u16,
        /// Not closed to a protocol once a flow of it has this address as its reply target, or if packets of it may be
        /// addressed to a frontend here ([`EndpointFlags::FRONTENDS`]).
        pub flow_hints: FlowHints,
    }
}

/// Bits of [`Endpoint::flags`].
#[derive(Clone, Copy, Debug)]
pub struct EndpointFlags;

impl EndpointFlags {
    /// An address of the host: packets go to its network stack.
    pub const HOST: u16 = 1;
    /// There are frontends at this address of the host (`hostPort`). Whoever sets it opens the gates.
    pub const FRONTENDS: u16 = 2;
    /// Packets to the pod wait in the queue of its host-side device, which limits their rate.
    pub const SHAPED: u16 = 4;
    /// Node ports are at this address of the host. Whoever sets it opens the gates.
    pub const NODE_PORTS: u16 = 8;
}

impl Endpoint {
    /// A pod behind the host-side device `ifindex`.
    pub const fn pod(ifindex: u32, mac: MacAddr) -> Self {
        Self { ifindex, mac, flags: 0, flow_hints: FlowHints::NONE }
    }

    /// An address of the host itself.
    pub const fn host() -> Self {
        Self {
            ifindex: 0,
            mac: MacAddr::new([0; 6]),
            flags: EndpointFlags::HOST,
            flow_hints: FlowHints::NONE,
        }
    }

    /// Whether packets to it go to the host's stack.
    #[inline(always)]
    pub const fn is_host(&self) -> bool {
        self.flags & EndpointFlags::HOST != 0
    }

    /// A pod to which packets go through the queue of its device.
    #[must_use]
    pub const fn with_queue(mut self) -> Self {
        self.flags |= EndpointFlags::SHAPED;
        self
    }

    /// Whether packets to it go through the queue of its device.
    #[inline(always)]
    pub const fn is_shaped(&self) -> bool {
        self.flags & EndpointFlags::SHAPED != 0
    }

    /// An address of the host with frontends at it.
    #[must_use]
    pub const fn with_frontends(mut self) -> Self {
        self.flags |= EndpointFlags::FRONTENDS;
        self
    }

    /// Whether there are frontends at it.
    pub const fn has_frontends(&self) -> bool {
        self.flags & EndpointFlags::FRONTENDS != 0
    }

    /// An address of the host at which node ports are.
    #[must_use]
    pub const fn with_node_ports(mut self) -> Self {
        self.flags |= EndpointFlags::NODE_PORTS;
        self
    }

    /// Whether node ports are at it.
    #[inline(always)]
    pub const fn has_node_ports(&self) -> bool {
        self.flags & EndpointFlags::NODE_PORTS != 0
    }

    /// The same endpoint with every gate open: what user space writes over an existing entry.
    #[must_use]
    pub const fn with_all_flow_hints(mut self) -> Self {
        self.flow_hints = FlowHints::ALL;
        self
    }

    /// The same endpoint with every gate closed: what two entries are compared by.
    #[must_use]
    pub const fn without_flow_hints(mut self) -> Self {
        self.flow_hints = FlowHints::NONE;
        self
    }
}
