//! FlowHints: which packets may belong to a flow, said where they are looked up anyway.

use crate::{abi, net::Protocol};

abi! {
    /// A byte for each group of protocols; not zero: packets of it may belong to a flow.
    ///
    /// Opened by the datapath when it makes a flow, never closed by it. A closed gate saves the flow lookup for every
    /// packet of traffic that is not translated: no packet that needs no flow has one. User space
    /// that rewrites a row must open all its gates, because it may race with the datapath.
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
    /// No flow has been made.
    pub const NONE: Self = Self { tcp: 0, udp: 0, icmp: 0, other: 0 };
    /// Any packet may belong to one.
    pub const ALL: Self = Self { tcp: 1, udp: 1, icmp: 1, other: 1 };

    /// Whether packets of an IP protocol may belong to a flow.
    #[inline(always)]
    pub const fn may_have_flow(&self, protocol: u8) -> bool {
        let gate = match protocol {
            Protocol::TCP => self.tcp,
            Protocol::UDP => self.udp,
            Protocol::ICMP | Protocol::ICMPV6 => self.icmp,
            _ => self.other,
        };
        gate != 0
    }

    /// From now on they may. Written only where it changes something: rows are read on every processor.
    #[inline(always)]
    pub const fn set(&mut self, protocol: u8) {
        let gate = match protocol {
            Protocol::TCP => &mut self.tcp,
            Protocol::UDP => &mut self.udp,
            Protocol::ICMP | Protocol::ICMPV6 => &mut self.icmp,
            _ => &mut self.other,
        };
        if *gate == 0 {
            *gate = 1;
        }
    }
}
