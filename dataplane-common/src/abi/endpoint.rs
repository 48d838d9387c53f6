//! `ENDPOINTS`: addresses of this node and of its pods.

use super::{FlowHints, MacAddr};
use crate::abi;

abi! {
    /// Value of `ENDPOINTS`, keyed by [`super::Addr`].
    pub struct Endpoint: 16 {
        /// Host-side device of the pod; 0 for an address of the host itself.
        pub ifindex: u32,
        /// Address of the device inside the pod.
        pub mac: MacAddr,
        /// Bits of [`EndpointFlags`].
        pub flags: u16,
        /// Set for a protocol once the replies of one of its flows go to this address, or if
        /// packets of it may be addressed to a frontend here ([`EndpointFlags::FRONTENDS`]).
        pub flow_hints: FlowHints,
    }
}

/// Bits of [`Endpoint::flags`].
#[derive(Clone, Copy, Debug)]
pub struct EndpointFlags;

impl EndpointFlags {
    /// An address of the host: packets go to the host's network stack.
    pub const HOST: u16 = 1;
    /// An address of the host with frontends (`hostPort`). User space that sets it must set all
    /// flow hints.
    pub const FRONTENDS: u16 = 2;
    /// The pod's ingress bandwidth is limited by a qdisc of its host-side device, so packets must
    /// pass that device.
    pub const SHAPED: u16 = 4;
    /// An address of the host that serves node ports. User space that sets it must set all flow
    /// hints.
    pub const NODE_PORTS: u16 = 8;
    /// The pod's device is down at one end: packets to it are dropped.
    pub const DOWN: u16 = 16;
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

    /// The same endpoint with packets passing the qdisc of its host-side device.
    #[must_use]
    pub const fn with_queue(mut self) -> Self {
        self.flags |= EndpointFlags::SHAPED;
        self
    }

    /// Whether packets to it must pass the qdisc of its host-side device.
    #[inline(always)]
    pub const fn is_shaped(&self) -> bool {
        self.flags & EndpointFlags::SHAPED != 0
    }

    /// The same endpoint with its device down.
    #[must_use]
    pub const fn with_device_down(mut self) -> Self {
        self.flags |= EndpointFlags::DOWN;
        self
    }

    /// The same endpoint with frontends at it.
    #[must_use]
    pub const fn with_frontends(mut self) -> Self {
        self.flags |= EndpointFlags::FRONTENDS;
        self
    }

    /// Whether there are frontends at it.
    pub const fn has_frontends(&self) -> bool {
        self.flags & EndpointFlags::FRONTENDS != 0
    }

    /// The same endpoint serving node ports.
    #[must_use]
    pub const fn with_node_ports(mut self) -> Self {
        self.flags |= EndpointFlags::NODE_PORTS;
        self
    }

    /// Whether it serves node ports.
    #[inline(always)]
    pub const fn has_node_ports(&self) -> bool {
        self.flags & EndpointFlags::NODE_PORTS != 0
    }

    /// Whether its device is down.
    #[inline(always)]
    pub const fn is_down(&self) -> bool {
        self.flags & EndpointFlags::DOWN != 0
    }

    /// The same endpoint with all flow hints set: what user space writes over an existing row.
    #[must_use]
    pub const fn with_all_flow_hints(mut self) -> Self {
        self.flow_hints = FlowHints::ALL;
        self
    }

    /// The same endpoint without flow hints, for comparing rows.
    #[must_use]
    pub const fn without_flow_hints(mut self) -> Self {
        self.flow_hints = FlowHints::NONE;
        self
    }
}
