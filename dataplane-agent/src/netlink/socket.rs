//! A netlink socket, for protocols that `rtnetlink` does not speak.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt,
        socket,
        sockopt::{RcvBuf, ReceiveTimeout},
    },
    time::TimeVal,
};

use super::wire::put_message;

/// `linux/netlink.h`: flags of a request.
pub(super) const REQUEST: u16 = 0x1;
pub(super) const ACK: u16 = 0x4;
pub(super) const DUMP: u16 = 0x300;
/// `linux/netlink.h`: kinds of messages. `ERROR` may have error number 0, and `DONE` may have
/// another.
pub(super) const ERROR: u16 = 2;
pub(super) const DONE: u16 = 3;
/// Size of the receive buffer in bytes.
const RECEIVE_BYTES: usize = 64 * 1024;
/// Receive timeout in seconds.
const TIMEOUT: i64 = 5;

/// A socket of one network namespace.
#[derive(Debug)]
pub(super) struct NetlinkSocket {
    socket: OwnedFd,
    /// Number of the last message, which its responses have.
    pub(super) sequence: u32,
}

impl NetlinkSocket {
    /// Opens the socket in the network namespace of the calling thread.
    pub(super) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        // the kernel responds before `sendto` returns: a response that is missing by then never
        // arrives
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(TIMEOUT, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes room for this many bytes of responses.
    pub(super) fn set_receive_buffer(&self, bytes: usize) -> io::Result<()> {
        Ok(setsockopt(&self.socket, RcvBuf, &bytes)?)
    }

    /// Appends a message: the header, and the parts of its body.
    pub(super) fn put(&mut self, messages: &mut Vec<u8>, kind: u16, flags: u16, body: &[&[u8]]) {
        self.sequence += 1;
        put_message(messages, kind, flags, self.sequence, body);
    }

    pub(super) fn send(&self, messages: &[u8]) -> io::Result<()> {
        sendto(self.socket.as_raw_fd(), messages, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        Ok(())
    }

    /// Sends one message.
    pub(super) fn request(&mut self, kind: u16, flags: u16, body: &[&[u8]]) -> io::Result<()> {
        let mut message = Vec::new();
        self.put(&mut message, kind, flags, body);
        self.send(&message)
    }

    /// Receives a buffer of messages.
    pub(super) fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        buffer.truncate(length);
        Ok(buffer)
    }
}
