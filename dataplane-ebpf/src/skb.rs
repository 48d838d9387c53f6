//! The kernel's helpers, each with the contract it is used under here. The only place that calls them.

use core::{ffi::c_void, marker::PhantomData};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_CURRENT_NETNS, BPF_F_INGRESS, BPF_F_INVALIDATE_HASH, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR,
        BPF_F_RECOMPUTE_CSUM, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibLookup, bpf_redir_neigh,
        bpf_redir_neigh__bindgen_ty_1, bpf_sock_addr,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as SocketTupleV4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as SocketTupleV6, bpf_tunnel_key,
    },
    helpers::generated::{
        bpf_clone_redirect, bpf_csum_update, bpf_fib_lookup, bpf_get_netns_cookie, bpf_get_prandom_u32,
        bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh,
        bpf_redirect_peer, bpf_sk_release, bpf_skb_change_head, bpf_skb_change_tail, bpf_skb_change_type,
        bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_set_tunnel_key, bpf_skb_store_bytes,
        bpf_skc_lookup_tcp,
    },
    programs::{SockAddrContext, TcContext},
};
use dataplane_common::{
    abi::{Addr, FlowKey, MacAddr, Port, SocketOrigin},
    checksum::Change,
    net::Header,
    reason::DropReason,
};

use crate::{
    maps,
    packet::{ChecksumField, Covers, Frame},
};

/// Set on packets one of our programs has decided: those that see them later on this node let them pass. The kernel
/// clears it when the packet enters another namespace.
const DECIDED: u32 = 0x0da7_a001;

/// Reads a field of the context.
macro_rules! field {
    ($ctx:expr, $field:ident) => {
        // SAFETY: the context pointer is valid for the run of the program, and the verifier turns the access into
        // one of the kernel's own structure.
        unsafe { (*$ctx.skb.skb).$field }
    };
}

impl Frame for TcContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn pull(&self, len: usize) -> Result<(), DropReason> {
        // SAFETY: the context is the one the kernel passed; any length is allowed.
        match unsafe { bpf_skb_pull_data(self.skb.skb, len as u32) } {
            0 => Ok(()),
            _ => Err(DropReason::Truncated),
        }
    }

    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Result<T, DropReason> {
        let mut header = core::mem::MaybeUninit::<T>::uninit();
        // SAFETY: the destination has size_of::<T>() writable bytes.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.skb.skb.cast(),
                offset as u32,
                header.as_mut_ptr().cast(),
                size_of::<T>() as u32,
            )
        };
        if result != 0 {
            return Err(DropReason::Truncated);
        }
        // SAFETY: the helper filled all bytes, and any bytes are a `T` (`Header`).
        Ok(unsafe { header.assume_init() })
    }

    #[inline(always)]
    fn write_u16(&self, offset: usize, value: u16) -> Result<(), DropReason> {
        // SAFETY: the source is a live u16.
        match unsafe { bpf_skb_store_bytes(self.skb.skb, offset as u32, (&raw const value).cast(), 2, 0) } {
            0 => Ok(()),
            _ => Err(DropReason::WriteFailed),
        }
    }

    #[inline(always)]
    fn mend_checksum(&self, field: ChecksumField, change: Change, covers: Covers) -> Result<(), DropReason> {
        let pseudo = match covers {
            Covers::PseudoHeader => BPF_F_PSEUDO_HDR,
            Covers::Segment => 0,
        };
        let flags = pseudo | if field.optional { BPF_F_MARK_MANGLED_0 } else { 0 };
        let (offset, difference) = (field.offset as u32, u64::from(change.difference()));
        // SAFETY: the context is the kernel's; a size of 0 in the flags with `from` 0 means that `to` is a difference.
        match unsafe { bpf_l4_csum_replace(self.skb.skb, offset, 0, difference, u64::from(flags)) } {
            0 => Ok(()),
            _ => Err(DropReason::WriteFailed),
        }
    }

    /// The device may have summed up the packet as it came (`CHECKSUM_COMPLETE`). An IPv4 header's own checksum makes up for what
    /// changes in it; IPv6 has none, and `mend_checksum` reckons with one.
    #[inline(always)]
    fn account(&self, change: Change) {
        // SAFETY: the context is the kernel's. Where the device has not, the helper has nothing to do and says so.
        let _not_summed_up = unsafe { bpf_csum_update(self.skb.skb, change.difference()) };
    }

    #[inline(always)]
    fn is_of_socket(&self, tuple: &FlowKey) -> bool {
        has_socket(self.skb.skb.cast(), tuple)
    }

    #[inline(always)]
    fn ether_type(&self) -> u16 {
        u16::from_be(field!(self, protocol) as u16)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        field!(self, len)
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        field!(self, gso_segs) > 1
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        field!(self, ifindex)
    }
}

/// Whether a TCP segment of this tuple, which comes by a device of the namespace of `ctx`, belongs to a socket there that does not
/// merely listen (Linux 5.2).
#[inline(always)]
pub(crate) fn has_socket(ctx: *mut c_void, tuple: &FlowKey) -> bool {
    const LISTENS: u32 = 10;
    let netns = i64::from(BPF_F_CURRENT_NETNS).cast_unsigned();
    let socket = if tuple.src.is_v4() {
        let (saddr, daddr) = (tuple.src.v4_part(), tuple.dst.v4_part());
        let (sport, dport) = (tuple.src_port.wire(), tuple.dst_port.wire());
        let mut ipv4 = SocketTupleV4 { saddr, daddr, sport, dport };
        let size = size_of::<SocketTupleV4>() as u32;
        // SAFETY: context and tuple are live, and of this size a tuple is IPv4's.
        unsafe { bpf_skc_lookup_tcp(ctx, (&raw mut ipv4).cast(), size, netns, 0) }
    } else {
        let tuple = (&raw const *tuple).cast_mut().cast();
        let size = size_of::<SocketTupleV6>() as u32;
        // SAFETY: as above; a flow's key begins as the kernel's tuple of IPv6 does, and the helper only reads it.
        unsafe { bpf_skc_lookup_tcp(ctx, tuple, size, netns, 0) }
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: not null: a socket whose reference is ours, until it is given back.
    unsafe {
        let state = (&raw const (*socket).state).read_volatile();
        bpf_sk_release(socket.cast());
        state != LISTENS
    }
}

/// Into the pod behind the host-side device `ifindex`, without a visit to a queue. Only from a device's ingress.
#[inline(always)]
pub(crate) fn redirect_peer(ifindex: u32) -> i32 {
    // SAFETY: no pointers.
    unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
}

/// Out of the device `ifindex` as it is.
#[inline(always)]
pub(crate) fn redirect(ifindex: u32) -> i32 {
    // SAFETY: no pointers.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
}

/// Out of the device `ifindex` to the neighbour `next_hop`, whose link address the kernel knows or finds out.
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

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// How the kernel would send a packet.
pub(crate) enum Way {
    /// Out of a device, to a link address, from the device's own.
    Neighbour { ifindex: u32, ours: MacAddr, theirs: MacAddr },
    /// Out of a device, to somebody whose link address is not known yet.
    Unresolved { ifindex: u32, next_hop: Addr },
    /// Not at all, or not without its stack (blackholes, tunnels, a smaller MTU).
    None,
}

/// Asks the kernel's routing tables about a packet that came by this device (Linux 4.18).
#[inline(always)]
pub(crate) fn way(ctx: &impl Frame, src: &Addr, dst: &Addr, length: u16) -> Way {
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
    // negative: the kernel refused the question
    match u32::try_from(result).unwrap_or(BPF_FIB_LKUP_RET_NOT_FWDED) {
        BPF_FIB_LKUP_RET_SUCCESS => Way::Neighbour {
            ifindex: params.ifindex,
            ours: MacAddr::new(params.smac),
            theirs: MacAddr::new(params.dmac),
        },
        BPF_FIB_LKUP_RET_NO_NEIGH => {
            // the kernel has written the next hop over the destination.
            // SAFETY: both members of the union are plain integers.
            let next_hop = unsafe {
                // IPv4 may go by a next hop of IPv6 (RFC 5549)
                if params.family == AF_INET as u8 {
                    Addr::v4_word(params.__bindgen_anon_4.ipv4_dst)
                } else {
                    Addr::v6_words(params.__bindgen_anon_4.ipv6_dst)
                }
            };
            Way::Unresolved { ifindex: params.ifindex, next_hop }
        }
        _ => Way::None,
    }
}

/// Into the device `ifindex`, as if it came from there.
#[inline(always)]
pub(crate) fn redirect_ingress(ifindex: u32) -> i32 {
    // SAFETY: no pointers.
    unsafe { bpf_redirect(ifindex, BPF_F_INGRESS.into()) as i32 }
}

/// Sends a copy of the frame into the device `ifindex`, as if it came from there.
#[inline(always)]
pub(crate) fn clone_to_ingress(ctx: &TcContext, ifindex: u32) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_clone_redirect(ctx.skb.skb, ifindex, BPF_F_INGRESS.into()) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Reads `len` bytes of the frame, 1 to `N`, from `offset` on.
#[inline(always)]
pub(crate) fn load<const N: usize>(
    ctx: &TcContext,
    offset: usize,
    into: &mut [u8; N],
    len: usize,
) -> Result<(), DropReason> {
    // SAFETY: the verifier proves that `len` bytes fit.
    match unsafe {
        bpf_skb_load_bytes(ctx.skb.skb.cast(), offset as u32, into.as_mut_ptr().cast(), len as u32)
    } {
        0 => Ok(()),
        _ => Err(DropReason::Truncated),
    }
}

/// Writes `len` bytes, 1 to `N`, over the frame from `offset` on.
#[inline(always)]
pub(crate) fn store<const N: usize>(
    ctx: &TcContext,
    offset: usize,
    from: &[u8; N],
    len: usize,
) -> Result<(), DropReason> {
    let flags = u64::from(BPF_F_RECOMPUTE_CSUM | BPF_F_INVALIDATE_HASH);
    // SAFETY: the verifier proves that there are `len` bytes.
    match unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset as u32, from.as_ptr().cast(), len as u32, flags) }
    {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Makes the frame `len` bytes long; what is new of it is zeros.
#[inline(always)]
pub(crate) fn set_length(ctx: &TcContext, len: usize) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_skb_change_tail(ctx.skb.skb, len as u32, 0) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Makes room for `len` bytes in front of the frame (Linux 5.8).
#[inline(always)]
pub(crate) fn make_room(ctx: &TcContext, len: usize) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_skb_change_head(ctx.skb.skb, len as u32, 0) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

/// Out of the device `ifindex` by the kernel's own route to the packet's destination, for packets of its stack.
///
/// Such a packet carries the route to where it was first meant for. With a next hop named the helper leaves it there, and
/// should the packet have to wait for the next hop's link address, it is then sent by the old route
/// (`net/core/neighbour.c`, `__neigh_update`). Without one it gets the new route.
#[inline(always)]
pub(crate) fn redirect_neigh_by_route(ifindex: u32) -> i32 {
    // SAFETY: the helper takes no parameters as a null pointer of no length.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Says where the overlay device shall send the packet.
#[inline(always)]
pub(crate) fn set_tunnel(ctx: &TcContext, vni: u32, remote: &Addr) -> Result<(), DropReason> {
    // the key as Linux 5.10 knows it, which refuses the longer one; later kernels go by the length they are told
    const LEN: usize = core::mem::offset_of!(bpf_tunnel_key, __bindgen_anon_3);
    // SAFETY: an all-zero key is a valid one.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = vni;
    key.tunnel_ttl = 64;
    // over IPv4 the outer UDP checksum only repeats what inner checksums prove; IPv6 demands it (RFC 8200 §8.1)
    let flags = if remote.is_v4() {
        // the helper takes IPv4 in host order, unlike IPv6
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be(remote.v4_part());
        BPF_F_ZERO_CSUM_TX
    } else {
        key.__bindgen_anon_1.remote_ipv6 = remote.words();
        BPF_F_TUNINFO_IPV6
    };
    // SAFETY: the key is initialised whole and outlives the call.
    let result = unsafe { bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, LEN as u32, u64::from(flags)) };
    match result {
        0 => Ok(()),
        _ => Err(DropReason::TunnelFailed),
    }
}

/// Lets the host's stack take the packet though its link address is somebody else's.
#[inline(always)]
pub(crate) fn address_to_host(ctx: &TcContext) -> Result<(), DropReason> {
    const PACKET_HOST: u32 = 0;
    if pkt_type(ctx) == PACKET_HOST {
        return Ok(());
    }
    // SAFETY: the context is the kernel's.
    match unsafe { bpf_skb_change_type(ctx.skb.skb, PACKET_HOST) } {
        0 => Ok(()),
        _ => Err(DropReason::WriteFailed),
    }
}

#[inline(always)]
fn pkt_type(ctx: &TcContext) -> u32 {
    field!(ctx, pkt_type)
}

#[inline(always)]
pub(crate) fn is_decided(ctx: &TcContext) -> bool {
    field!(ctx, mark) == DECIDED
}

#[inline(always)]
pub(crate) fn mark_decided(ctx: &TcContext) {
    // SAFETY: as in `field!`; `mark` is writable in tc programs.
    unsafe { (*ctx.skb.skb).mark = DECIDED };
}

/// Seconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn now() -> u32 {
    (now_ns() / 1_000_000_000) as u32
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_get_prandom_u32() }
}

/// The socket and the address a cgroup program is asked about.
pub(crate) struct Socket<'a> {
    ctx: &'a SockAddrContext,
    v6: bool,
    _addr: PhantomData<bpf_sock_addr>,
}

impl<'a> Socket<'a> {
    /// In a program of the `…4` hooks.
    #[inline(always)]
    pub(crate) const fn v4(ctx: &'a SockAddrContext) -> Self {
        Self { ctx, v6: false, _addr: PhantomData }
    }

    /// In a program of the `…6` hooks. The address may be a mapped IPv4 one, which is how it is kept anyway.
    #[inline(always)]
    pub(crate) const fn v6(ctx: &'a SockAddrContext) -> Self {
        Self { ctx, v6: true, _addr: PhantomData }
    }

    #[inline(always)]
    pub(crate) fn protocol(&self) -> u8 {
        // SAFETY: the context pointer is valid for the run of the program.
        unsafe { (*self.ctx.sock_addr).protocol as u8 }
    }

    #[inline(always)]
    pub(crate) fn addr(&self) -> Addr {
        let sock_addr = self.ctx.sock_addr;
        // SAFETY: as above. Volatile: the kernel allows these fields to be read word by word only, and the compiler
        // would join the loads.
        unsafe {
            if self.v6 {
                let words = (&raw const (*sock_addr).user_ip6).cast::<u32>();
                Addr::v6_words([
                    words.read_volatile(),
                    words.add(1).read_volatile(),
                    words.add(2).read_volatile(),
                    words.add(3).read_volatile(),
                ])
            } else {
                Addr::v4_word((&raw const (*sock_addr).user_ip4).read_volatile())
            }
        }
    }

    #[inline(always)]
    pub(crate) fn port(&self) -> Port {
        // SAFETY: as above.
        Port::from_wire(unsafe { (&raw const (*self.ctx.sock_addr).user_port).read_volatile() } as u16)
    }

    /// Replaces the address. An IPv4 socket can only be given an IPv4 address: whether it could.
    #[inline(always)]
    pub(crate) fn set(&self, addr: &Addr, port: Port) -> bool {
        let sock_addr = self.ctx.sock_addr;
        // SAFETY: as above; address and port are writable in these hooks, word by word.
        unsafe {
            if self.v6 {
                let words = (&raw mut (*sock_addr).user_ip6).cast::<u32>();
                let [a, b, c, d] = addr.words();
                words.write_volatile(a);
                words.add(1).write_volatile(b);
                words.add(2).write_volatile(c);
                words.add(3).write_volatile(d);
            } else if addr.is_v4() {
                (&raw mut (*sock_addr).user_ip4).write_volatile(addr.v4_part());
            } else {
                return false;
            }
            (&raw mut (*sock_addr).user_port).write_volatile(u32::from(port.wire()));
        }
        true
    }

    /// Number of the socket, never used again.
    #[inline(always)]
    pub(crate) fn cookie(&self) -> u64 {
        // SAFETY: the context is the kernel's.
        unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) }
    }

    /// Cookie of the socket's network namespace (Linux 5.7), never 0.
    #[inline(always)]
    pub(crate) fn netns(&self) -> u64 {
        // SAFETY: the context is the kernel's.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }

    /// What the socket was connected to, if it was translated.
    #[inline(always)]
    pub(crate) fn origin(&self) -> Option<SocketOrigin> {
        // SAFETY: the helper returns null or a value that lives as long as the socket, which outlives the program.
        unsafe { maps::connected_origins().get_ptr_mut(self.ctx).as_ref() }.copied()
    }

    /// Remembers it for the life of the socket. Without memory for it the socket works, and sees the backend's address.
    #[inline(always)]
    pub(crate) fn set_origin(&self, mut origin: SocketOrigin) {
        // SAFETY: as in `origin`.
        let stored =
            unsafe { maps::connected_origins().get_or_insert_ptr_mut(self.ctx, Some(&mut origin)).as_mut() };
        if let Some(stored) = stored {
            *stored = origin;
        }
    }
}

/// Protocol and number of a socket that is being closed.
#[inline(always)]
pub(crate) fn closing(ctx: &aya_ebpf::programs::SockContext) -> (u8, u64) {
    // SAFETY: the context pointer is valid for the run of the program, and the helper takes it as it is.
    unsafe { ((*ctx.sock).protocol as u8, bpf_get_socket_cookie(ctx.as_ptr())) }
}
