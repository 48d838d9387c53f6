//! Sockets of a network namespace, as the kernel lists them (`sock_diag`), and their end.
//!
//! By hand: one message there and one back, for which no crate is needed that says the rest of it too. Knows sockets by
//! their numbers (cookies), and not why they are to end.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt,
        socket, sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};

use super::wire::{Message, error_of, messages};

/// `linux/netlink.h`
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `linux/sock_diag.h`
const LIST: u16 = 20;
const DESTROY: u16 = 21;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const UDP: u8 = 17;
/// Bit of the state that connected UDP sockets have (`net/tcp_states.h`).
const ESTABLISHED: u32 = 1 << 1;
/// Bytes of `inet_diag_sockid`, which ends with the cookie, and where it is in `inet_diag_msg` (`linux/inet_diag.h`).
const ID: usize = 48;
const ID_AT: usize = 4;
const COOKIE: usize = 8;

/// Bytes of an answer at a time; the kernel fills pages.
const ANSWER: usize = 64 * 1024;
/// Seconds.
const PATIENCE: i64 = 5;

/// A connected UDP socket.
#[derive(Clone, Copy, Debug)]
struct Socket {
    family: u8,
    /// Addresses, ports and cookie, as the kernel wants them back.
    id: [u8; ID],
}

/// Why sockets could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum SockDiagError {
    /// It is built without.
    #[error("the kernel has no {0}")]
    Unsupported(&'static str),
    #[error("{operation} UDP sockets: {source}")]
    Kernel { operation: &'static str, source: io::Error },
}

/// A conversation with the kernel about the sockets of one network namespace.
#[derive(Debug)]
pub struct SockDiag {
    socket: OwnedFd,
    sequence: u32,
}

impl SockDiag {
    /// About the namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Ends the conversations of connected UDP sockets with these cookies: whoever uses such a socket next hears
    /// `ECONNABORTED`, and it is connected to nobody. Returns how many were there.
    pub fn end(&mut self, cookies: &HashSet<u64>) -> Result<usize, SockDiagError> {
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(nix::libc::ENOENT) => SockDiagError::Unsupported("CONFIG_INET_UDP_DIAG"),
            _ => SockDiagError::Kernel { operation: "list", source },
        };
        let refused = |source: io::Error| match source.raw_os_error() {
            Some(nix::libc::EOPNOTSUPP) => SockDiagError::Unsupported("CONFIG_INET_DIAG_DESTROY"),
            _ => SockDiagError::Kernel { operation: "end", source },
        };
        let mut ended = 0;
        for family in [IPV4, IPV6] {
            for socket in self.connected(family).map_err(failed)? {
                if cookies.contains(&socket.cookie()) && self.destroy(&socket).map_err(refused)? {
                    ended += 1;
                }
            }
        }
        Ok(ended)
    }

    /// Connected UDP sockets of a family.
    fn connected(&mut self, family: u8) -> io::Result<Vec<Socket>> {
        self.send(LIST, REQUEST | DUMP, family, &[0; ID])?;
        let mut found = Vec::new();
        loop {
            let buffer = self.receive()?;
            for message in messages(&buffer) {
                if message.sequence != self.sequence {
                    continue;
                }
                match message.kind {
                    // the end of a list may say why it ended
                    DONE | ERROR => match error_of(message.body) {
                        0 => return Ok(found),
                        errno => return Err(io::Error::from_raw_os_error(errno)),
                    },
                    LIST => found.extend(Socket::read(message.body)),
                    _ => {}
                }
            }
        }
    }

    /// Whether it was there. One that was connected anew meanwhile has other addresses, and is left alone.
    fn destroy(&mut self, socket: &Socket) -> io::Result<bool> {
        self.send(DESTROY, REQUEST | ACK, socket.family, &socket.id)?;
        loop {
            let buffer = self.receive()?;
            let mine = |message: &Message<'_>| message.sequence == self.sequence && message.kind == ERROR;
            let Some(answer) = messages(&buffer).find(mine) else { continue };
            return match error_of(answer.body) {
                0 => Ok(true),
                nix::libc::ENOENT => Ok(false),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
        }
    }

    /// Sends a header and an `inet_diag_req_v2`.
    fn send(&mut self, kind: u16, flags: u16, family: u8, id: &[u8; ID]) -> io::Result<()> {
        self.sequence += 1;
        let mut message = Vec::new();
        message.extend(0_u32.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0_u32.to_ne_bytes());
        message.extend([family, UDP, 0, 0]);
        message.extend(ESTABLISHED.to_ne_bytes());
        message.extend(id);
        let length = (message.len() as u32).to_ne_bytes();
        message[..4].copy_from_slice(&length);
        sendto(self.socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; ANSWER];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        buffer.truncate(length);
        Ok(buffer)
    }
}

impl Socket {
    /// A socket of a list.
    fn read(body: &[u8]) -> Option<Self> {
        let id = body.get(ID_AT..ID_AT + ID)?.try_into().ok()?;
        Some(Self { family: *body.first()?, id })
    }

    /// As `bpf_get_socket_cookie` has it: two words, the low one first.
    fn cookie(&self) -> u64 {
        let word = |at: usize| {
            let bytes = self.id[ID - COOKIE + at..][..4].try_into();
            u64::from(u32::from_ne_bytes(bytes.unwrap_or_default()))
        };
        word(0) | word(4) << 32
    }
}
