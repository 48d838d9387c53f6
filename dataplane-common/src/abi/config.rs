//! Configuration of the programs: constants of the node, which the verifier uses to prune disabled
//! code, and variables, which may change while the programs run.

use super::{Addr, MacAddr, Port};
use crate::abi;

abi! {
    /// `.rodata` symbol `NODE` of the object, set by the loader.
    pub struct NodeConfig: 44 {
        /// Link address of the host side of every pod device.
        pub host_mac: MacAddr,
        /// Link address of the overlay device, the same on every node.
        pub overlay_mac: MacAddr,
        /// VXLAN network identifier.
        pub overlay_vni: u32,
        /// UDP port of the tunnel; 0: there is none.
        pub overlay_port: Port,
        /// Must be 0.
        pub reserved: u16,
        /// First port of the range for source translation (inclusive).
        pub snat_first: Port,
        /// Last port of that range (inclusive).
        pub snat_last: Port,
        /// Entries of `FLOWS`.
        pub flow_slots: u32,
        /// Bits of [`NodeFlags`].
        pub flags: u32,
        /// Cookie of the host's network namespace in native byte order (`SO_NETNS_COOKIE`,
        /// Linux 5.14); 0 if the kernel does not support it.
        pub host_netns: [u8; 8],
        /// Bits of `skb->mark` that packets carry once a program has handled them; never 0. No
        /// other bit is read or written.
        pub mark: u32,
    }

    /// `.data` symbol `NODE_VARIABLES` of the object, written by the agent whenever one of them
    /// changes.
    pub struct NodeVariables: 100 {
        /// Source of masqueraded IPv4 packets; unspecified = IPv4 is not masqueraded.
        pub ipv4: Addr,
        /// Source of masqueraded IPv6 packets; unspecified = IPv6 is not masqueraded.
        pub ipv6: Addr,
        /// Prefix of all IPv4 cluster IPs.
        pub cluster_ipv4: ClusterRange,
        /// Prefix of all IPv6 cluster IPs.
        pub cluster_ipv6: ClusterRange,
        /// Not 0: packets between pods and machines outside of the cluster take the kernel's stack,
        /// in both directions.
        pub egress_stack: u32,
    }

    /// A prefix that holds every cluster IP of a family: an address outside of it is no cluster IP,
    /// without a lookup in `SERVICES`.
    pub struct ClusterRange: 32 {
        /// First address.
        pub addr: Addr,
        /// Netmask. All zeros with an `addr` that is not 0: an empty range.
        pub mask: Addr,
    }
}

impl ClusterRange {
    /// A range without addresses.
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
    /// Masquerade pods' packets to outside of the cluster.
    pub const MASQUERADE: u32 = 4;
    /// Send an event for every packet, not only for drops.
    pub const TRACE: u32 = 8;
    /// Host processes can connect to node ports on loopback addresses.
    pub const LOOPBACK_NODE_PORTS: u32 = 16;
    /// Read the tunnel key from the packet's control buffer (`skb->cb`: VNI, IPv4 address of the
    /// sender) instead of the tunnel's metadata, which `BPF_PROG_TEST_RUN` cannot set. For tests.
    pub const TUNNEL_KEY_IN_CB: u32 = 32;
    /// Answer pings to service addresses with a ready backend.
    pub const ANSWER_PING: u32 = 64;
    /// The kernel has `bpf_ktime_get_coarse_ns` (Linux 5.11).
    pub const COARSE_CLOCK: u32 = 128;
}
