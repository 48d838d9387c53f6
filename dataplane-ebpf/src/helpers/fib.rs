//! Lookups in the kernel's routing tables.

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS,
        bpf_fib_lookup as FibLookup,
    },
    helpers::generated::bpf_fib_lookup,
};
use dataplane_common::abi::{Addr, MacAddr};

use super::{AF_INET, AF_INET6};
use crate::frame::Frame;

/// Where the kernel would send a packet next.
pub(crate) enum NextHop {
    /// Out of a device, to a neighbour whose link address is known. `mtu` of the route in bytes of
    /// IP packet; before Linux 5.13, the length that was looked up.
    Resolved { ifindex: u32, next_hop: Addr, src_mac: MacAddr, dst_mac: MacAddr, mtu: u16 },
    /// Out of a device, to a neighbour whose link address is not known yet.
    Unresolved { ifindex: u32, next_hop: Addr },
    /// Nowhere, or not without the stack (blackhole, tunnel, smaller MTU).
    None,
}

/// The length of a packet that is sent on whatever the MTU. Not 0: then the kernel compares the
/// frame with the device (`is_skb_forwardable`), including an Ethernet header for which a device
/// without one has no room.
pub(crate) const ANY_LENGTH: u16 = 1;

/// Looks up the route and neighbour of a packet that arrived on this device (Linux 4.18). `length`
/// of the IP packet in bytes, which must not exceed the route's MTU, or [`ANY_LENGTH`].
#[inline(always)]
pub(crate) fn fib_lookup(ctx: &impl Frame, src: &Addr, dst: &Addr, length: u16) -> NextHop {
    // SAFETY: all-zero bytes are a valid value of a structure of integers.
    let mut params: FibLookup = unsafe { core::mem::zeroed() };
    params.ifindex = ctx.ifindex();
    params.__bindgen_anon_1.tot_len = length;
    if dst.is_v4() {
        params.family = AF_INET as u8;
        params.__bindgen_anon_3.ipv4_src = src.v4_part();
        params.__bindgen_anon_4.ipv4_dst = dst.v4_part();
    } else {
        params.family = AF_INET6 as u8;
        params.__bindgen_anon_3.ipv6_src = src.words();
        params.__bindgen_anon_4.ipv6_dst = dst.words();
    }
    // SAFETY: the context is the kernel's; `params` is initialised whole and outlives the call.
    let result = unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut params, size_of::<FibLookup>() as i32, 0) };
    // the kernel has written the next hop over the destination.
    // SAFETY: both members of the union are plain integers.
    let next_hop = unsafe {
        // an IPv4 route may have an IPv6 next hop (RFC 5549)
        if params.family == AF_INET as u8 {
            Addr::v4_word(params.__bindgen_anon_4.ipv4_dst)
        } else {
            Addr::v6_words(params.__bindgen_anon_4.ipv6_dst)
        }
    };
    // negative: the helper refused its arguments
    match u32::try_from(result).unwrap_or(BPF_FIB_LKUP_RET_NOT_FWDED) {
        BPF_FIB_LKUP_RET_SUCCESS => NextHop::Resolved {
            ifindex: params.ifindex,
            next_hop,
            src_mac: MacAddr::new(params.smac),
            dst_mac: MacAddr::new(params.dmac),
            // SAFETY: as above.
            mtu: unsafe { params.__bindgen_anon_1.mtu_result },
        },
        BPF_FIB_LKUP_RET_NO_NEIGH => NextHop::Unresolved { ifindex: params.ifindex, next_hop },
        _ => NextHop::None,
    }
}
