//! Configuration of the programs.
//!
//! [`NodeConfig`] is constant to the verifier, which prunes the branches it disables.
//! [`NodeVariables`] may change while the programs run.

use core::{cell::UnsafeCell, ptr};

use dataplane_common::abi::{Addr, ClusterRange, MacAddr, NodeConfig, NodeFlags, NodeVariables, Port};

/// Overwritten by the loader before the object is loaded (`dataplane_common::abi::names::NODE`).
#[unsafe(link_section = ".rodata")]
#[unsafe(no_mangle)]
static NODE: NodeConfig = NodeConfig {
    host_mac: MacAddr::new([0; 6]),
    overlay_mac: MacAddr::new([0; 6]),
    overlay_vni: 0,
    overlay_port: Port::new(0),
    reserved: 0,
    snat_first: Port::new(0),
    snat_last: Port::new(0),
    flow_slots: 0,
    flags: 0,
    host_netns: [0; 8],
    mark: 0,
};

#[repr(transparent)]
struct Shared<T>(UnsafeCell<T>);

// SAFETY: programs only read it; what user space writes meanwhile is plain bytes, every pattern of
// which is valid.
unsafe impl<T> Sync for Shared<T> {}

/// Written by user space while the programs run (`dataplane_common::abi::names::NODE_VARIABLES`).
#[unsafe(link_section = ".data")]
#[unsafe(no_mangle)]
static NODE_VARIABLES: Shared<NodeVariables> = Shared(UnsafeCell::new(NodeVariables {
    ipv4: Addr::UNSPECIFIED,
    ipv6: Addr::UNSPECIFIED,
    cluster_ipv4: ClusterRange::EMPTY,
    cluster_ipv6: ClusterRange::EMPTY,
    egress_stack: 0,
}));

/// Reads one field. Volatile, or the compiler would use the zeros it sees instead of what the
/// loader wrote; field by field, because a copy of the whole would take too much of the 512-byte
/// stack.
macro_rules! field {
    ($field:ident) => {
        // SAFETY: `NODE` is an initialised static, aligned as its type says.
        unsafe { ptr::read_volatile(&raw const NODE.$field) }
    };
}

/// As above, of `NODE_VARIABLES`; volatile, because user space writes it.
macro_rules! variable {
    ($field:ident) => {
        // SAFETY: `NODE_VARIABLES` is an initialised static, aligned as its type says
        unsafe { ptr::read_volatile(&raw const (*NODE_VARIABLES.0.get()).$field) }
    };
}

#[inline(always)]
pub(crate) fn flag(flag: u32) -> bool {
    field!(flags) & flag != 0
}

#[inline(always)]
pub(crate) fn trace() -> bool {
    flag(NodeFlags::TRACE)
}

#[inline(always)]
pub(crate) fn ipv4() -> Addr {
    variable!(ipv4)
}

#[inline(always)]
pub(crate) fn ipv6() -> Addr {
    variable!(ipv6)
}

#[inline(always)]
pub(crate) fn cluster_ipv4() -> ClusterRange {
    variable!(cluster_ipv4)
}

#[inline(always)]
pub(crate) fn cluster_ipv6() -> ClusterRange {
    variable!(cluster_ipv6)
}

/// Packets between pods and machines outside of the cluster take the kernel's stack.
#[inline(always)]
pub(crate) fn egress_stack() -> bool {
    variable!(egress_stack) != 0
}

#[inline(always)]
pub(crate) fn host_mac() -> MacAddr {
    field!(host_mac)
}

#[inline(always)]
pub(crate) fn overlay_mac() -> MacAddr {
    field!(overlay_mac)
}

#[inline(always)]
pub(crate) fn overlay_vni() -> u32 {
    field!(overlay_vni)
}

#[inline(always)]
pub(crate) fn overlay_port() -> Port {
    field!(overlay_port)
}

/// First port and size of the range for source translation.
#[inline(always)]
pub(crate) fn snat_ports() -> (u16, u32) {
    let (first, last) = (field!(snat_first).get(), field!(snat_last).get());
    (first, u32::from(last.saturating_sub(first)) + 1)
}

/// Slots of `FLOWS`.
#[inline(always)]
pub(crate) fn flow_slots() -> u32 {
    field!(flow_slots)
}

/// Bits of `skb->mark` that say that a packet has been handled.
#[inline(always)]
pub(crate) fn mark() -> u32 {
    field!(mark)
}

/// Cookie of the host's network namespace; 0 if unknown, which no namespace has.
#[inline(always)]
pub(crate) fn host_netns() -> u64 {
    u64::from_ne_bytes(field!(host_netns))
}
