//! `DEVICES`: devices that carry the node's traffic, by index.

use super::{Addr, MacAddr};
use crate::abi;

abi! {
    /// Value of `DEVICES`, keyed by ifindex (`u32`).
    ///
    /// A device has a row while its programs are attached, so that packets to its addresses pass
    /// them.
    pub struct Device: 40 {
        /// Source of IPv4 packets that are translated and leave by this device; unspecified: it has
        /// no IPv4 address.
        pub ipv4: Addr,
        /// Source of IPv6 packets that are translated and leave by this device; unspecified: it has
        /// no IPv6 address.
        pub ipv6: Addr,
        /// Bits of [`DeviceFlags`].
        pub flags: u16,
        /// Its link address, to which frames for this node are addressed; zeros without an Ethernet
        /// header.
        pub mac: MacAddr,
    }
}

/// Bits of [`Device::flags`].
#[derive(Clone, Copy, Debug)]
pub struct DeviceFlags;

impl DeviceFlags {
    /// Frames have an Ethernet header. Unset: packets begin with the IP header (`WireGuard`, tun,
    /// IPIP).
    pub const ETHERNET: u16 = 1;
}

impl Device {
    /// Whether frames have an Ethernet header.
    #[inline(always)]
    pub const fn is_ethernet(&self) -> bool {
        self.flags & DeviceFlags::ETHERNET != 0
    }
}
