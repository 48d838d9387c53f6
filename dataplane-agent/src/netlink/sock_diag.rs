//! Lists and destroys UDP sockets of a network namespace (`sock_diag`).
//!
//! Implemented here because two messages do not justify a dependency. Sockets are identified by
//! their cookies.

use std::{collections::HashSet, io};

use nix::sys::socket::SockProtocol;

use super::{
    socket::{ACK, DONE, DUMP, ERROR, NetlinkSocket, REQUEST},
    wire::{Message, error_of, messages},
};

/// `linux/sock_diag.h`
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const UDP: u8 = 17;
/// State bit of connected UDP sockets (`net/tcp_states.h`).
const ESTABLISHED: u32 = 1 << 1;
/// Size of `inet_diag_sockid`, which ends with the cookie, and its offset in `inet_diag_msg`
/// (`linux/inet_diag.h`).
const ID_BYTES: usize = 48;
const ID_OFFSET: usize = 4;
const COOKIE_BYTES: usize = 8;

/// A connected UDP socket.
#[derive(Clone, Copy, Debug)]
struct Socket {
    family: u8,
    /// `inet_diag_sockid` of the kernel's list: addresses, ports and cookie.
    id: [u8; ID_BYTES],
}

/// Why sockets could not be destroyed.
#[derive(Debug, thiserror::Error)]
pub enum SockDiagError {
    /// A kernel option is missing.
    #[error("the kernel has no {0}")]
    Unsupported(&'static str),
    #[error("{operation} UDP sockets: {source}")]
    Kernel { operation: &'static str, source: io::Error },
}

/// A `sock_diag` netlink socket of one network namespace.
#[derive(Debug)]
pub struct SockDiag {
    socket: NetlinkSocket,
}

impl SockDiag {
    /// Opens the socket in the network namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        NetlinkSocket::open(SockProtocol::NetlinkSockDiag).map(|socket| Self { socket })
    }

    /// Destroys the connected UDP sockets with these cookies: the next call on such a socket fails
    /// with `ECONNABORTED`, and the socket is not connected any more. Returns the number of
    /// destroyed sockets.
    pub fn destroy(&mut self, cookies: &HashSet<u64>) -> Result<usize, SockDiagError> {
        let list_error = |source: io::Error| match source.raw_os_error() {
            Some(nix::libc::ENOENT) => SockDiagError::Unsupported("CONFIG_INET_UDP_DIAG"),
            _ => SockDiagError::Kernel { operation: "list", source },
        };
        let destroy_error = |source: io::Error| match source.raw_os_error() {
            Some(nix::libc::EOPNOTSUPP) => SockDiagError::Unsupported("CONFIG_INET_DIAG_DESTROY"),
            _ => SockDiagError::Kernel { operation: "destroy", source },
        };
        let mut destroyed = 0;
        for family in [IPV4, IPV6] {
            for socket in self.connected(family).map_err(list_error)? {
                if cookies.contains(&socket.cookie())
                    && self.destroy_socket(&socket).map_err(destroy_error)?
                {
                    destroyed += 1;
                }
            }
        }
        Ok(destroyed)
    }

    /// Connected UDP sockets of a family.
    fn connected(&mut self, family: u8) -> io::Result<Vec<Socket>> {
        self.send(BY_FAMILY, REQUEST | DUMP, family, &[0; ID_BYTES])?;
        let mut found = Vec::new();
        loop {
            let buffer = self.socket.receive()?;
            for message in messages(&buffer) {
                if message.sequence != self.socket.sequence {
                    continue;
                }
                match message.kind {
                    // DONE can also carry an error
                    DONE | ERROR => match error_of(message.body) {
                        0 => return Ok(found),
                        errno => return Err(io::Error::from_raw_os_error(errno)),
                    },
                    BY_FAMILY => found.extend(Socket::read(message.body)),
                    _ => {}
                }
            }
        }
    }

    /// Destroys a socket; false if it does not exist. A socket that was connected again meanwhile
    /// has another ID.
    fn destroy_socket(&mut self, socket: &Socket) -> io::Result<bool> {
        self.send(DESTROY, REQUEST | ACK, socket.family, &socket.id)?;
        loop {
            let buffer = self.socket.receive()?;
            let is_response =
                |message: &Message<'_>| message.sequence == self.socket.sequence && message.kind == ERROR;
            let Some(response) = messages(&buffer).find(is_response) else { continue };
            return match error_of(response.body) {
                0 => Ok(true),
                nix::libc::ENOENT => Ok(false),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
        }
    }

    /// Sends an `inet_diag_req_v2`.
    fn send(&mut self, kind: u16, flags: u16, family: u8, id: &[u8; ID_BYTES]) -> io::Result<()> {
        self.socket.request(kind, flags, &[&[family, UDP, 0, 0], &ESTABLISHED.to_ne_bytes(), id])
    }
}

impl Socket {
    /// Reads an `inet_diag_msg`.
    fn read(body: &[u8]) -> Option<Self> {
        let id = body.get(ID_OFFSET..ID_OFFSET + ID_BYTES)?.try_into().ok()?;
        Some(Self { family: *body.first()?, id })
    }

    /// The cookie as `bpf_get_socket_cookie` returns it: two words, the low one first.
    fn cookie(&self) -> u64 {
        let word = |at: usize| {
            let bytes = self.id[ID_BYTES - COOKIE_BYTES + at..][..4].try_into();
            u64::from(u32::from_ne_bytes(bytes.unwrap_or_default()))
        };
        word(0) | word(4) << 32
    }
}
