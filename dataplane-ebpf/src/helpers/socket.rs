//! Sockets: lookups by tuple, and the socket that a cgroup program runs for.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_CURRENT_NETNS, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as SocketTupleV4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as SocketTupleV6,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_release, bpf_skc_lookup_tcp},
    programs::{SockAddrContext, SockContext},
};
use dataplane_common::abi::{Addr, FlowKey, Port, SocketOrigin};

use crate::maps;

/// Whether a TCP segment of this tuple belongs to a socket, other than a listening one, in the
/// namespace of the device it arrived on (Linux 5.2).
#[inline(always)]
pub(crate) fn has_connected_socket(ctx: *mut c_void, tuple: &FlowKey) -> bool {
    const TCP_LISTEN: u32 = 10;
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
        // SAFETY: as above; `FlowKey` begins with the fields of the kernel's IPv6 tuple, and the
        // helper only reads it.
        unsafe { bpf_skc_lookup_tcp(ctx, tuple, size, netns, 0) }
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: not null: a socket whose reference this program holds until it releases it.
    unsafe {
        let state = (&raw const (*socket).state).read_volatile();
        bpf_sk_release(socket.cast());
        state != TCP_LISTEN
    }
}

/// The socket that a cgroup program runs for, and the address of the call.
pub(crate) struct Socket<'a> {
    ctx: &'a SockAddrContext,
    v6: bool,
}

impl<'a> Socket<'a> {
    /// In a program of an IPv4 attach type (`connect4`, ..).
    #[inline(always)]
    pub(crate) const fn v4(ctx: &'a SockAddrContext) -> Self {
        Self { ctx, v6: false }
    }

    /// In a program of an IPv6 attach type (`connect6`, ..). The address may be a mapped IPv4 one,
    /// the form in which [`Addr`] keeps IPv4 anyway.
    #[inline(always)]
    pub(crate) const fn v6(ctx: &'a SockAddrContext) -> Self {
        Self { ctx, v6: true }
    }

    #[inline(always)]
    pub(crate) fn protocol(&self) -> u8 {
        // SAFETY: the context pointer is valid for the run of the program.
        unsafe { (*self.ctx.sock_addr).protocol as u8 }
    }

    #[inline(always)]
    pub(crate) fn addr(&self) -> Addr {
        let sock_addr = self.ctx.sock_addr;
        // SAFETY: as above. Volatile: the kernel allows these fields to be read word by word only,
        // and the compiler would join the loads.
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

    /// Replaces address and port. False if an IPv4 socket would need an IPv6 address.
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

    /// Number of the socket, never used twice.
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

    /// Frontend and backend of the socket, if `connect()` was translated.
    #[inline(always)]
    pub(crate) fn origin(&self) -> Option<SocketOrigin> {
        // SAFETY: the helper returns null or a value that lives as long as the socket, which
        // outlives the program.
        unsafe { maps::connected_origins().get_ptr_mut(self.ctx).as_ref() }.copied()
    }

    /// Stores frontend and backend for the life of the socket. If the kernel has no memory for it,
    /// the socket works, and `getpeername()` shows the backend.
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

/// Protocol and cookie of a socket that is being closed.
#[inline(always)]
pub(crate) fn closing(ctx: &SockContext) -> (u8, u64) {
    // SAFETY: the context pointer is valid for the run of the program, and the helper takes it as
    // it is.
    unsafe { ((*ctx.sock).protocol as u8, bpf_get_socket_cookie(ctx.as_ptr())) }
}
