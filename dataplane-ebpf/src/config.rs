//! The node's configuration: constants to the verifier, which prunes the branches they disable.

use core::ptr;

use dataplane_common::abi::{Addr, MacAddr, NodeConfig, NodeFlags, Port};

/// Overwritten by the loader before the object is loaded (`dataplane_common::abi::names::NODE`).
#[unsafe(link_section = ".rodata")]
#[unsafe(no_mangle)]
static NODE: NodeConfig = NodeConfig {
    ipv4: Addr::UNSPECIFIED,
    ipv6: Addr::UNSPECIFIED,
    host_mac: MacAddr::new([0; 6]),
    overlay_mac: MacAddr::new([0; 6]),
    overlay_ifindex: 0,
    overlay_vni: 0,
    snat_first: Port::new(0),
    snat_last: Port::new(0),
    flow_slots: 0,
    flags: 0,
    flow_probes: 0,
    host_netns: [0; 8],
};

/// Reads one field. Volatile, or the compiler would use the zeros it sees instead of what the loader wrote; field by
/// field, because a copy of the whole would not fit the habits of a 512-byte stack.
macro_rules! field {
    ($field:ident) => {
        // SAFETY: `NODE` is an initialised static, aligned as its type says.
        unsafe { ptr::read_volatile(&raw const NODE.$field) }
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
    field!(ipv4)
}

#[inline(always)]
pub(crate) fn ipv6() -> Addr {
    field!(ipv6)
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

/// First port of the range for source translation, and how many there are.
#[inline(always)]
pub(crate) fn snat_ports() -> (u16, u32) {
    let (first, last) = (field!(snat_first).get(), field!(snat_last).get());
    (first, u32::from(last.saturating_sub(first)) + 1)
}

#[inline(always)]
pub(crate) fn flow_probes() -> u32 {
    field!(flow_probes)
}

/// Cookie of the host's network namespace; 0 is no namespace's.
#[inline(always)]
pub(crate) fn host_netns() -> u64 {
    u64::from_ne_bytes(field!(host_netns))
}
