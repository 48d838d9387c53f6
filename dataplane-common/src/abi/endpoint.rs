//! `ENDPOINTS`: addresses that live on this node.

use super::MacAddr;
use crate::{abi, net::Protocol};

abi! {
    /// Value of `ENDPOINTS`, keyed by [`super::Addr`]: where an address of this node lives.
    pub struct Endpoint: 16 {
        /// Host-side device of the pod; 0 for an address of the host itself.
        pub ifindex: u32,
        /// Address of the device inside the pod.
        pub mac: MacAddr,
        /// Bits of [`EndpointFlags`].
        pub flags: u16,
        /// One byte per [`Gate`]: not zero once a flow of that protocol has this address as its reply target.
        ///
        /// Set by the datapath, never cleared by it. A closed gate saves the flow lookup for every packet of
        /// traffic that is not translated (DESIGN §3: no flow entry for a packet that needs none). User space
        /// that rewrites an entry of an existing address must open all gates, because it may race with the datapath.
        pub gates: [u8; GATES],
    }
}

/// Number of gates.
pub const GATES: usize = 4;
/// Opens every gate.
const ALL_OPEN: [u8; GATES] = [1; GATES];

/// Which byte of [`Endpoint::gates`] speaks for a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Gate {
    /// TCP.
    Tcp = 0,
    /// UDP.
    Udp = 1,
    /// ICMP and ICMPv6 echo.
    Icmp = 2,
    /// Anything else (SCTP).
    Other = 3,
}

impl Gate {
    /// The gate of an IP protocol number.
    #[inline(always)]
    pub const fn of(protocol: u8) -> Self {
        match protocol {
            Protocol::TCP => Self::Tcp,
            Protocol::UDP => Self::Udp,
            Protocol::ICMP | Protocol::ICMPV6 => Self::Icmp,
            _ => Self::Other,
        }
    }
}

/// Bits of [`Endpoint::flags`].
#[derive(Clone, Copy, Debug)]
pub struct EndpointFlags;

impl EndpointFlags {
    /// An address of the host: packets go to its network stack.
    pub const HOST: u16 = 1;
}

impl Endpoint {
    /// A pod behind the host-side device `ifindex`.
    pub const fn pod(ifindex: u32, mac: MacAddr) -> Self {
        Self { ifindex, mac, flags: 0, gates: [0; GATES] }
    }

    /// An address of the host itself.
    pub const fn host() -> Self {
        Self { ifindex: 0, mac: MacAddr::new([0; 6]), flags: EndpointFlags::HOST, gates: [0; GATES] }
    }

    /// Whether packets to it go to the host's stack.
    #[inline(always)]
    pub const fn is_host(&self) -> bool {
        self.flags & EndpointFlags::HOST != 0
    }

    /// Whether replies of this protocol may need a reverse translation.
    #[inline(always)]
    pub fn gate_open(&self, protocol: u8) -> bool {
        // `get`, because an index the verifier must bound costs less than a panic it must refuse
        self.gates.get(Gate::of(protocol) as usize).is_some_and(|gate| *gate != 0)
    }

    /// The same endpoint with every gate open: what user space writes over an existing entry.
    #[must_use]
    pub const fn with_gates_open(mut self) -> Self {
        self.gates = ALL_OPEN;
        self
    }

    /// The same endpoint with every gate closed: what two entries are compared by.
    #[must_use]
    pub const fn without_gates(mut self) -> Self {
        self.gates = [0; GATES];
        self
    }
}
