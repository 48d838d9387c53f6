//! What tc programs do with an `sk_buff`: redirect it, resize it, mark it, copy bytes in and out.

use aya_ebpf::{
    bindings::{
        BPF_F_INGRESS, BPF_F_INVALIDATE_HASH, BPF_F_RECOMPUTE_CSUM, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1, bpf_tunnel_key,
    },
    helpers::generated::{
        bpf_clone_redirect, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_adjust_room,
        bpf_skb_change_head, bpf_skb_change_tail, bpf_skb_change_type, bpf_skb_get_tunnel_key,
        bpf_skb_load_bytes, bpf_skb_set_tunnel_key, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use dataplane_common::{
    abi::{Addr, NodeFlags},
    reason::DropReason,
};

use super::{AF_INET, AF_INET6};
use crate::config;

/// Bytes of the tunnel key as Linux 5.10 knows it, which refuses the longer one; later kernels
/// accept the shorter length.
const TUNNEL_KEY_LEN: usize = core::mem::offset_of!(bpf_tunnel_key, __bindgen_anon_3);

/// Reads a field of `struct __sk_buff`.
macro_rules! skb_field {
    ($ctx:expr, $field:ident) => {
        // SAFETY: the context pointer is valid for the run of the program, and the verifier turns
        // the access into one of the kernel's own structure.
        unsafe { (*$ctx.skb.skb).$field }
    };
}
pub(crate) use skb_field;

/// Whether one of these programs has already handled the packet on this node: `skb->mark` has all
/// bits of [`config::mark`]. The kernel clears the mark when a packet enters another network
/// namespace.
#[inline(always)]
pub(crate) fn is_handled(ctx: &TcContext) -> bool {
    let mark = config::mark();
    skb_field!(ctx, mark) & mark == mark
}

/// Marks the packet for [`is_handled`]. The other bits of the mark belong to other programs.
#[inline(always)]
pub(crate) fn mark_handled(ctx: &TcContext) {
    let mark = skb_field!(ctx, mark) | config::mark();
    // SAFETY: as in `skb_field!`; `mark` is writable in tc programs.
    unsafe { (*ctx.skb.skb).mark = mark };
}

/// Redirects into the pod behind the host-side device `ifindex`, without a queue in between
/// (Linux 5.10). Only from tc ingress.
#[inline(always)]
pub(crate) fn redirect_peer(ifindex: u32) -> i32 {
    // SAFETY: no pointers.
    unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
}

/// Redirects out of the device `ifindex`, link addresses as they are.
#[inline(always)]
pub(crate) fn redirect(ifindex: u32) -> i32 {
    // SAFETY: no pointers.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
}

/// Redirects out of the device `ifindex` to the neighbour `next_hop`, whose link address the kernel
/// resolves.
#[inline(always)]
pub(crate) fn redirect_neigh(ifindex: u32, next_hop: &Addr) -> i32 {
    let (family, words) = if next_hop.is_v4() {
        (AF_INET, [next_hop.v4_part(), 0, 0, 0])
    } else {
        (AF_INET6, next_hop.words())
    };
    // the IPv4 address is the first word of the union
    let mut params = bpf_redir_neigh {
        nh_family: family,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: words },
    };
    // SAFETY: `params` is initialised whole and outlives the call.
    unsafe { bpf_redirect_neigh(ifindex, &raw mut params, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
}

/// Redirects out of the device `ifindex` by the kernel's own route to the packet's destination; for
/// packets of the host's stack.
///
/// Such a packet carries the route to its destination before translation. With a next hop named the
/// helper keeps that route, and a packet that has to wait for neighbour resolution is then sent by
/// it (`net/core/neighbour.c`, `__neigh_update`). Without a next hop the helper looks up the new
/// route.
#[inline(always)]
pub(crate) fn redirect_neigh_by_route(ifindex: u32) -> i32 {
    // SAFETY: the helper takes no parameters as a null pointer of no length.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Redirects to the ingress of the device `ifindex`, as if the packet arrived there.
#[inline(always)]
pub(crate) fn redirect_ingress(ifindex: u32) -> i32 {
    // SAFETY: no pointers.
    unsafe { bpf_redirect(ifindex, BPF_F_INGRESS.into()) as i32 }
}

/// Sends a copy of the frame to the ingress of the device `ifindex`.
#[inline(always)]
pub(crate) fn clone_to_ingress(ctx: &TcContext, ifindex: u32) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_clone_redirect(ctx.skb.skb, ifindex, BPF_F_INGRESS.into()) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Copies `len` bytes of the frame, 1 to `N`, from `offset` on into `buffer`.
#[inline(always)]
pub(crate) fn load<const N: usize>(
    ctx: &TcContext,
    offset: usize,
    buffer: &mut [u8; N],
    len: usize,
) -> Result<(), DropReason> {
    // SAFETY: the verifier proves that `len` bytes fit.
    match unsafe {
        bpf_skb_load_bytes(ctx.skb.skb.cast(), offset as u32, buffer.as_mut_ptr().cast(), len as u32)
    } {
        0 => Ok(()),
        _ => Err(DropReason::Truncated),
    }
}

/// Copies the first `len` bytes of `buffer`, 1 to `N`, over the frame from `offset` on.
#[inline(always)]
pub(crate) fn store<const N: usize>(
    ctx: &TcContext,
    offset: usize,
    buffer: &[u8; N],
    len: usize,
) -> Result<(), DropReason> {
    let flags = u64::from(BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH);
    // SAFETY: the verifier proves that there are `len` bytes.
    match unsafe {
        bpf_skb_store_bytes(ctx.skb.skb, offset as u32, buffer.as_ptr().cast(), len as u32, flags)
    } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Makes the frame `len` bytes long; bytes added at the end are zero.
#[inline(always)]
pub(crate) fn set_len(ctx: &TcContext, len: usize) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_skb_change_tail(ctx.skb.skb, len as u32, 0) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Adds `len` bytes between the Ethernet header and the IP header (Linux 5.2). The kernel knows
/// then that its network header is there, which it takes for the length of the link header when it
/// redirects to a device without one.
#[inline(always)]
pub(crate) fn grow_behind_ethernet(ctx: &TcContext, len: usize) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_skb_adjust_room(ctx.skb.skb, len as i32, BPF_ADJ_ROOM_MAC, 0) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Adds `len` bytes in front of the frame (Linux 5.8).
#[inline(always)]
pub(crate) fn grow_head(ctx: &TcContext, len: usize) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_skb_change_head(ctx.skb.skb, len as u32, 0) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Sets the tunnel key: where the VXLAN device sends the packet.
#[inline(always)]
pub(crate) fn set_tunnel(ctx: &TcContext, vni: u32, remote: &Addr) -> Result<(), DropReason> {
    // SAFETY: an all-zero key is a valid one.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = vni;
    key.tunnel_ttl = 64;
    // over IPv4 the outer UDP checksum only repeats what inner checksums prove; IPv6 demands it
    // (RFC 8200 §8.1)
    let flags = if remote.is_v4() {
        // the helper takes IPv4 in host order, unlike IPv6
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be(remote.v4_part());
        BPF_F_ZERO_CSUM_TX
    } else {
        key.__bindgen_anon_1.remote_ipv6 = remote.words();
        BPF_F_TUNINFO_IPV6
    };
    // SAFETY: the key is initialised whole and outlives the call.
    let result =
        unsafe { bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, TUNNEL_KEY_LEN as u32, u64::from(flags)) };
    match result {
        0 => Ok(()),
        _ => Err(DropReason::TunnelFailed),
    }
}

/// Sets `skb->pkt_type` to `PACKET_HOST`: a receiving stack drops what arrived as
/// `PACKET_OTHERHOST`.
#[inline(always)]
pub(crate) fn set_packet_host(ctx: &TcContext) -> Result<(), DropReason> {
    if addressed_to(ctx) == AddressedTo::Host {
        return Ok(());
    }
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_skb_change_type(ctx.skb.skb, AddressedTo::Host as u32) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Whom a frame is addressed to (`skb->pkt_type`, by its destination link address).
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum AddressedTo {
    /// This device.
    Host = 0,
    /// All stations, or a group.
    Group = 1,
    /// Another station: a switch floods, or the device is in promiscuous mode.
    Other = 3,
}

#[inline(always)]
pub(crate) fn addressed_to(ctx: &TcContext) -> AddressedTo {
    match skb_field!(ctx, pkt_type) {
        0 => AddressedTo::Host,
        3 => AddressedTo::Other,
        _ => AddressedTo::Group,
    }
}

/// Bytes of payload of each packet that this one will be cut into; 0: it stays whole.
#[inline(always)]
pub(crate) fn gso_size(ctx: &TcContext) -> u32 {
    skb_field!(ctx, gso_size)
}

/// Whether the frame had a VLAN tag, which the kernel keeps beside it.
#[inline(always)]
pub(crate) fn has_vlan_tag(ctx: &TcContext) -> bool {
    skb_field!(ctx, vlan_present) != 0
}

/// From whom the tunnel received a packet.
pub(crate) struct TunnelSender {
    pub(crate) vni: u32,
    /// Source of the outer packet.
    pub(crate) addr: Addr,
}

/// The sender of a packet that the overlay device received (Linux 4.3).
#[inline(always)]
pub(crate) fn tunnel_sender(ctx: &TcContext) -> Result<TunnelSender, DropReason> {
    if config::flag(NodeFlags::TUNNEL_KEY_IN_CB) {
        let cb = skb_field!(ctx, cb);
        return Ok(TunnelSender { vni: cb[0], addr: Addr::v4_word(cb[1]) });
    }
    // SAFETY: all-zero bytes are a valid key.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    let read = |key: &mut bpf_tunnel_key, flags: u32| {
        // SAFETY: the key is writable for its whole length.
        unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, key, TUNNEL_KEY_LEN as u32, flags.into()) }
    };
    // the helper refuses the flag of the other family
    if read(&mut key, 0) == 0 {
        // SAFETY: the helper has filled the IPv4 address, in host order.
        let addr = unsafe { key.__bindgen_anon_1.remote_ipv4 };
        return Ok(TunnelSender { vni: key.tunnel_id, addr: Addr::v4_word(addr.to_be()) });
    }
    if read(&mut key, BPF_F_TUNINFO_IPV6) == 0 {
        // SAFETY: the helper has filled the IPv6 address, in network order.
        let addr = unsafe { key.__bindgen_anon_1.remote_ipv6 };
        return Ok(TunnelSender { vni: key.tunnel_id, addr: Addr::v6_words(addr) });
    }
    Err(DropReason::TunnelSource)
}
