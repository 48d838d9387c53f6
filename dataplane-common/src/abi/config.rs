//! What the programs know of their node: what is constant while they are loaded (the verifier prunes what it disables),
//! and its addresses, which come and change while they run.

use super::{Addr, MacAddr, Port};
use crate::abi;

abi! {
    /// `.rodata` symbol `NODE` of the object, set by the loader.
    pub struct NodeConfig: 40 {
        /// Link address of the host side of every pod device.
        pub host_mac: MacAddr,
        /// Link address of the overlay device, the same on every node.
        pub overlay_mac: MacAddr,
        /// VXLAN network identifier.
        pub overlay_vni: u32,
        /// First port of the range that belongs to source translation (inclusive).
        pub snat_first: Port,
        /// Last port of that range (inclusive).
        pub snat_last: Port,
        /// Entries of `FLOWS`.
        pub flow_slots: u32,
        /// Bits of [`NodeFlags`].
        pub flags: u32,
        /// Slots of `FLOWS` a new flow may examine before it is refused.
        pub flow_probes: u32,
        /// Cookie of the host's network namespace, in the machine's byte order (`SO_NETNS_COOKIE`, Linux 5.14); 0 if
        /// the kernel does not tell.
        pub host_netns: [u8; 8],
    }

    /// `.data` symbol `NODE_ADDRESSES` of the object, written whenever they change.
    pub struct NodeAddresses: 96 {
        /// Source of masqueraded IPv4 packets; unspecified = IPv4 is not masqueraded.
        pub ipv4: Addr,
        /// Source of masqueraded IPv6 packets; unspecified = IPv6 is not masqueraded.
        pub ipv6: Addr,
        /// Where IPv4 cluster IPs are.
        pub cluster_ipv4: ClusterRange,
        /// Where IPv6 cluster IPs are.
        pub cluster_ipv6: ClusterRange,
    }

    /// A prefix that holds every cluster IP of a family: what is not in it needs no look at `SERVICES` to say so.
    pub struct ClusterRange: 32 {
        /// First address.
        pub addr: Addr,
        /// Ones where an address is to be as `addr`; all zeros with an address that is not 0: nothing is in it.
        pub mask: Addr,
    }
}

impl ClusterRange {
    /// Nothing.
    pub const EMPTY: Self = Self { addr: Addr::v4([0; 4]), mask: Addr::UNSPECIFIED };

    /// Whether the address is in it.
    #[inline(always)]
    pub const fn contains(&self, addr: &Addr) -> bool {
        let (is, first, mask) = (addr.words(), self.addr.words(), self.mask.words());
        (is[0] & mask[0]) ^ first[0]
            | (is[1] & mask[1]) ^ first[1]
            | (is[2] & mask[2]) ^ first[2]
            | (is[3] & mask[3]) ^ first[3]
            == 0
    }
}

/// Bits of [`NodeConfig::flags`].
#[derive(Clone, Copy, Debug)]
pub struct NodeFlags;

impl NodeFlags {
    /// Translate TCP at `connect()`.
    pub const CONNECT_TCP: u32 = 1;
    /// Translate UDP at `connect()` and `sendmsg()`.
    pub const CONNECT_UDP: u32 = 2;
    /// Masquerade what leaves the cluster.
    pub const MASQUERADE: u32 = 4;
    /// Report every packet to `EVENTS`, not only drops.
    pub const TRACE: u32 = 8;
    /// Processes of the host find node ports at their loopback address too.
    pub const LOOPBACK_NODE_PORTS: u32 = 16;
}
