//! Sockets: lookups by tuple, and the socket that a cgroup program runs for.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as SocketTupleV4,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as SocketTupleV6,
    },
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sk_lookup_tcp, bpf_sk_release, bpf_sk_storage_get,
        bpf_skc_lookup_tcp,
    },
    programs::{SockAddrContext, SockContext},
};
use dataplane_common::abi::{Addr, FlowKey, Port, SocketOrigin};

use crate::maps;

/// Socket states (`include/net/tcp_states.h`); a connected UDP socket is "established".
const TCP_ESTABLISHED: u32 = 1;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
/// Protocol of an MPTCP socket; its connections are TCP sockets of their own ("subflows").
const IPPROTO_MPTCP: u32 = 262;

/// Whether a TCP segment of this tuple belongs to a socket, other than a listening one, in the
/// namespace of the device it arrived on (Linux 5.2).
#[inline(always)]
pub(crate) fn has_connected_socket(ctx: *mut c_void, tuple: &FlowKey) -> bool {
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

/// Whether this is a socket, `__sk_buff::sk`, with this local port, that is neither connected nor
/// connecting; null is none.
#[inline(always)]
pub(crate) fn is_unconnected(socket: *const bpf_sock, port: Port) -> bool {
    if socket.is_null() {
        return false;
    }
    // SAFETY: not null: the socket of a packet outlives the program. Volatile: the kernel allows
    // the fields to be read as a whole only.
    unsafe {
        (&raw const (*socket).state).read_volatile() == TCP_CLOSE
            && (&raw const (*socket).src_port).read_volatile() == u32::from(port.get())
    }
}

/// Reads an IPv6 address word by word: the kernel allows nothing else of its structures, and the
/// compiler would join the loads.
///
/// # Safety
/// The pointer is to a field of a live context or socket.
#[inline(always)]
unsafe fn read_words(field: *const [u32; 4]) -> [u32; 4] {
    let words = field.cast::<u32>();
    // SAFETY: the caller's promise.
    unsafe {
        [
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ]
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
        // SAFETY: as above. Volatile: as in `read_words`.
        unsafe {
            if self.v6 {
                Addr::v6_words(read_words(&raw const (*sock_addr).user_ip6))
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

    /// Whether the socket is connected to the address. False after `connect(AF_UNSPEC)`, for which
    /// the kernel runs no program.
    #[inline(always)]
    pub(crate) fn is_connected_to(&self, addr: &Addr, port: Port) -> bool {
        let socket = self.kernel_socket();
        // SAFETY: as in `addr`: the kernel's socket outlives the program, and allows these fields
        // to be read word by word.
        unsafe {
            let remote = if self.v6 {
                Addr::v6_words(read_words(&raw const (*socket).dst_ip6))
            } else {
                Addr::v4_word((&raw const (*socket).dst_ip4).read_volatile())
            };
            (&raw const (*socket).state).read_volatile() == TCP_ESTABLISHED
                && remote == *addr
                && Port::from_wire((&raw const (*socket).dst_port).read_volatile()) == port
        }
    }

    #[inline(always)]
    fn kernel_socket(&self) -> *mut bpf_sock {
        // SAFETY: the context pointer is valid for the run of the program; the field is never null.
        unsafe { (*self.ctx.sock_addr).__bindgen_anon_1.sk }
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

    /// Frontend and backend of the socket, if its last `connect()` was translated.
    #[inline(always)]
    pub(crate) fn origin(&self) -> Option<SocketOrigin> {
        // SAFETY: the helper returns null or a value that lives as long as the socket, which
        // outlives the program.
        unsafe { maps::connected_origins().get_ptr_mut(self.ctx).as_ref() }.copied()
    }

    /// As [`Self::origin`], for an MPTCP socket that is connected to the address of the call:
    /// `connect()` runs the programs for its first subflow, which has another storage.
    #[inline(always)]
    pub(crate) fn subflow_origin(&self) -> Option<SocketOrigin> {
        // SAFETY: as in `protocol`.
        if unsafe { (*self.ctx.sock_addr).protocol } != IPPROTO_MPTCP {
            return None;
        }
        let (remote, socket) = (self.addr(), self.kernel_socket());
        let ctx = self.ctx.as_ptr();
        let netns = i64::from(BPF_F_CURRENT_NETNS).cast_unsigned();
        let sport = self.port().wire();
        // SAFETY: as in `is_connected_to`; the tuples are live and of their family's size.
        let subflow = unsafe {
            let dport = ((&raw const (*socket).src_port).read_volatile() as u16).to_be();
            if remote.is_v4() {
                let daddr = (&raw const (*socket).src_ip4).read_volatile();
                let mut tuple = SocketTupleV4 { saddr: remote.v4_part(), daddr, sport, dport };
                let size = size_of::<SocketTupleV4>() as u32;
                bpf_sk_lookup_tcp(ctx, (&raw mut tuple).cast(), size, netns, 0)
            } else {
                let daddr = read_words(&raw const (*socket).src_ip6);
                let mut tuple = SocketTupleV6 { saddr: remote.words(), daddr, sport, dport };
                let size = size_of::<SocketTupleV6>() as u32;
                bpf_sk_lookup_tcp(ctx, (&raw mut tuple).cast(), size, netns, 0)
            }
        };
        if subflow.is_null() {
            return None;
        }
        // SAFETY: not null: a socket whose reference this program holds until it releases it, and
        // whose storage is copied before.
        unsafe {
            let map = (&raw const *maps::connected_origins()).cast_mut().cast();
            let stored = bpf_sk_storage_get(map, subflow.cast(), ptr::null_mut(), 0);
            let origin = stored.cast::<SocketOrigin>().as_ref().copied();
            bpf_sk_release(subflow.cast());
            origin
        }
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

    /// Removes frontend and backend: the socket connects to an address that is no frontend.
    #[inline(always)]
    pub(crate) fn remove_origin(&self) {
        // SAFETY: as in `kernel_socket`. Absent for most sockets, which were never translated.
        let _absent = unsafe { maps::connected_origins().delete(self.kernel_socket()) };
    }
}

/// Protocol and cookie of a socket that is being closed.
#[inline(always)]
pub(crate) fn closing(ctx: &SockContext) -> (u8, u64) {
    // SAFETY: the context pointer is valid for the run of the program, and the helper takes it as
    // it is.
    unsafe { ((*ctx.sock).protocol as u8, bpf_get_socket_cookie(ctx.as_ptr())) }
}
