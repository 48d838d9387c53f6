//! SCTP's handshake by raw sockets, for kernels without SCTP: the first packet of an association and the first answer.
//!
//! Such a socket has no port: it gets every packet between two addresses, and its owner takes what is for him. Nothing of the
//! kernel answers beside it as long as the kernel has no SCTP of its own. No hook for sockets sees it, either.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io::{Error, ErrorKind, IoSliceMut, Result as IoResult},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    cmsg_space,
    errno::Errno,
    libc::{in6_pktinfo, sock_extended_err, sockaddr_in6},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage,
        bind, connect, recvmsg, send, sendto, setsockopt, socket, sockopt,
    },
};

use super::init::{self, Chunk, Packet};

/// Longest packet that is read: ours are much shorter.
const LONGEST: usize = 2_048;
/// Ports of clients: those the kernel gives its own.
const PORTS: std::ops::Range<u16> = 32_768..60_999;

/// Asks for an association, and leaves it once it was answered; what the answer says.
///
/// # Errors
/// What ICMP says of the INIT, as a connected socket would hear it; `ConnectionAborted`: the other end has nobody at that
/// port; `TimedOut`: silence; `InvalidData`: an answer to this INIT that is not what it should be.
pub(super) fn ask(server: SocketAddr, patience: Duration) -> IoResult<String> {
    let deadline = Instant::now() + patience;
    let question = Question::new(server)?;
    question.send(0, Chunk::Init { tag: question.tag })?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(question.socket.as_fd(), PollFlags::POLLIN)], timeout)?;
        question.hear_refusals()?;
        while let Some(bytes) = question.receive()? {
            let Some((peer, answer)) = question.judge(&bytes)? else { continue };
            // who does not end it leaves a half-open association to everyone on the way
            question.send(peer, Chunk::Abort)?;
            return Ok(answer);
        }
    }
}

/// An INIT that wants an answer.
struct Question {
    socket: OwnedFd,
    server: SocketAddr,
    port: u16,
    /// What the answer must carry.
    tag: u32,
}

impl Question {
    fn new(server: SocketAddr) -> IoResult<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let chance = RandomState::new().build_hasher().finish();
        let number = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id() as u16);
        let port = PORTS.start + number % (PORTS.end - PORTS.start);
        let socket = raw(server.ip(), SockFlag::SOCK_NONBLOCK)?;
        // an error is then known with the packet it is about: others between the same two addresses are not ours
        match server {
            SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?,
            SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?,
        }
        connect(socket.as_raw_fd(), &to(server.ip()))?;
        // a tag of zero is an INIT's
        Ok(Self { socket, server, port, tag: chance as u32 | 1 })
    }

    fn send(&self, tag: u32, chunk: Chunk) -> IoResult<()> {
        let bytes = Packet { from: self.port, to: self.server.port(), tag, chunk }.write();
        loop {
            match send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()) {
                // somebody else was refused between the same two addresses
                Err(Errno::ECONNREFUSED) => {}
                // dropped on its way out of the host, which only who asks for errors is told: silence, for any other
                Ok(_) | Err(Errno::ENOBUFS) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What there is; none of it may be ours.
    fn receive(&self) -> IoResult<Option<Vec<u8>>> {
        let mut buffer = [0; LONGEST];
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, None, MsgFlags::empty());
        let read = message.map(|message| message.bytes);
        match read {
            Ok(len) => Ok(Some(transport(self.server.ip(), &buffer[..len]).to_vec())),
            Err(Errno::EAGAIN) => Ok(None),
            // as above: ours comes by the queue
            Err(Errno::ECONNREFUSED) => Ok(Some(Vec::new())),
            Err(error) => Err(error.into()),
        }
    }

    /// The error that is about this question, if there is one.
    fn hear_refusals(&self) -> IoResult<()> {
        loop {
            let mut buffer = [0; LONGEST];
            let mut space = cmsg_space!(sock_extended_err, sockaddr_in6);
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_ERRQUEUE;
            let message = match recvmsg::<SockaddrStorage>(
                self.socket.as_raw_fd(),
                &mut parts,
                Some(&mut space),
                flags,
            ) {
                Ok(message) => message,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let number = message.cmsgs()?.find_map(|control| match control {
                ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
                    Some(error.ee_errno as i32)
                }
                _ => None,
            });
            let len = message.bytes;
            let is_ours = init::ports(&buffer[..len]) == Some((self.port, self.server.port()));
            if let Some(number) = number.filter(|_| is_ours) {
                return Err(Error::from_raw_os_error(number));
            }
        }
    }

    /// Tag of who answers, and the answer; `None`: it is for somebody else.
    fn judge(&self, bytes: &[u8]) -> IoResult<Option<(u32, String)>> {
        let Some((from, _)) = init::ports(bytes).filter(|(_, to)| *to == self.port) else { return Ok(None) };
        let wrong = |what: &str| Error::new(ErrorKind::InvalidData, what.to_owned());
        if from != self.server.port() {
            return Err(wrong(&format!("answered by port {from}")));
        }
        let packet = Packet::read(bytes).map_err(wrong)?;
        match packet.chunk {
            // our own, come back
            Chunk::Init { tag } if packet.tag == 0 && tag == self.tag => Err(wrong("the question came back")),
            _ if packet.tag != self.tag => Err(wrong(&format!("answered with tag {:#x}", packet.tag))),
            Chunk::InitAck { tag, answer } => Ok(Some((tag, answer))),
            Chunk::Abort => Err(ErrorKind::ConnectionAborted.into()),
            Chunk::Init { .. } | Chunk::Other(_) => Err(wrong(&format!("answered by {:?}", packet.chunk))),
        }
    }
}

/// A server: says its name and whom it sees to who asks for an association at `port`, of any address, and aborts all others.
pub(super) struct Server {
    socket: OwnedFd,
    any: IpAddr,
}

impl Server {
    /// Of both families.
    pub(super) fn both() -> Result<[Self; 2]> {
        Ok([Self::of(Ipv4Addr::UNSPECIFIED.into())?, Self::of(Ipv6Addr::UNSPECIFIED.into())?])
    }

    fn of(any: IpAddr) -> Result<Self> {
        let socket = raw(any, SockFlag::empty()).context("a raw socket of SCTP")?;
        if any.is_ipv6() {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        }
        Ok(Self { socket, any })
    }

    pub(super) fn run(&self, name: &str, port: u16) -> Result<()> {
        loop {
            let Some((client, own, bytes)) = self.receive()? else { continue };
            // not ours to say: it was not what it should be, or no question
            let Ok(Packet { from, to, tag: 0, chunk: Chunk::Init { tag } }) = Packet::read(&bytes) else {
                continue;
            };
            let chunk = if to == port {
                Chunk::InitAck { tag: !tag | 1, answer: format!("{name} {}", SocketAddr::new(client, from)) }
            } else {
                Chunk::Abort
            };
            let answer = Packet { from: to, to: from, tag, chunk }.write();
            // whom it does not reach will say so
            let _unsent = self.answer(own, client, &answer);
        }
    }

    /// Who asks, at which address, what.
    fn receive(&self) -> Result<Option<(IpAddr, IpAddr, Vec<u8>)>> {
        let mut buffer = [0; LONGEST];
        let mut space = cmsg_space!(in6_pktinfo);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let read = recvmsg::<SockaddrStorage>(
            self.socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::empty(),
        );
        let message = read.context("receive SCTP")?;
        let client = message.address.and_then(|address| ip(&address));
        let info = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)))
            }
            _ => None,
        });
        let len = message.bytes;
        let packet = &buffer[..len];
        // of IPv4 there is the header
        let header = packet.get(16..20).and_then(|octets| <[u8; 4]>::try_from(octets).ok());
        let own = if self.any.is_ipv4() { header.map(IpAddr::from) } else { info };
        let transport = transport(self.any, packet).to_vec();
        Ok(client.zip(own).map(|(client, own)| (client, own, transport)))
    }

    /// From the address that was asked.
    fn answer(&self, own: IpAddr, client: IpAddr, bytes: &[u8]) -> nix::Result<()> {
        let socket = raw(self.any, SockFlag::empty())?;
        bind(socket.as_raw_fd(), &to(own))?;
        sendto(socket.as_raw_fd(), bytes, &to(client), MsgFlags::empty()).map(drop)
    }
}

fn raw(of: IpAddr, flags: SockFlag) -> nix::Result<OwnedFd> {
    let family = if of.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Raw, flags | SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp)
}

/// Raw sockets take no port.
fn to(ip: IpAddr) -> SockaddrStorage {
    SocketAddr::new(ip, 0).into()
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip())))
}

/// What a socket of this family got, without the header that only IPv4 shows.
fn transport(family: IpAddr, packet: &[u8]) -> &[u8] {
    let header = match packet.first() {
        Some(first) if family.is_ipv4() => usize::from(first & 0xf) * 4,
        _ => 0,
    };
    packet.get(header..).unwrap_or_default()
}
