//! Network namespace cookies: the programs compare a socket's with the host's.

use std::os::{fd::AsRawFd as _, unix::net::UnixDatagram};

/// `SO_NETNS_COOKIE` (Linux 5.14, `include/uapi/asm-generic/socket.h`).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Cookie of the calling thread's network namespace, as `bpf_get_netns_cookie` returns it; `None`
/// if the kernel does not support it.
pub fn cookie() -> Option<u64> {
    let socket = UnixDatagram::unbound().ok()?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the socket is open, and the option is as long as `cookie`, which `len` says.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(cookie)
}
