//! Flow hints: whether packets to a destination may belong to a flow, stored in the row that
//! forwarding reads anyway.

use crate::{abi, net::Protocol};

abi! {
    /// One byte per group of protocols; not 0: packets of it may belong to a flow.
    ///
    /// A cleared hint saves the flow lookup: pod-to-pod traffic that is not translated has no
    /// flows. The datapath sets a hint when it creates a flow and never clears it. User space that
    /// rewrites a row must set all its hints, because the datapath may set one at the same time.
    pub struct FlowHints: 4 {
        /// TCP.
        pub tcp: u8,
        /// UDP.
        pub udp: u8,
        /// ICMP and ICMPv6 echo.
        pub icmp: u8,
        /// Anything else (SCTP).
        pub other: u8,
    }
}

impl FlowHints {
    /// No packet belongs to a flow.
    pub const NONE: Self = Self { tcp: 0, udp: 0, icmp: 0, other: 0 };
    /// Any packet may belong to a flow.
    pub const ALL: Self = Self { tcp: 1, udp: 1, icmp: 1, other: 1 };

    /// Whether packets of an IP protocol may belong to a flow.
    #[inline(always)]
    pub const fn may_have_flow(&self, protocol: u8) -> bool {
        let hint = match protocol {
            Protocol::TCP => self.tcp,
            Protocol::UDP => self.udp,
            Protocol::ICMP | Protocol::ICMPV6 => self.icmp,
            _ => self.other,
        };
        hint != 0
    }

    /// Sets the hint of an IP protocol. Writes only a change, because all CPUs read the row.
    #[inline(always)]
    pub const fn set(&mut self, protocol: u8) {
        let hint = match protocol {
            Protocol::TCP => &mut self.tcp,
            Protocol::UDP => &mut self.udp,
            Protocol::ICMP | Protocol::ICMPV6 => &mut self.icmp,
            _ => &mut self.other,
        };
        if *hint == 0 {
            *hint = 1;
        }
    }
}
