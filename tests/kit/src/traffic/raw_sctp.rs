//! The SCTP handshake with raw sockets, for kernels without SCTP: INIT and the first response.
//!
//! A raw socket has no port: it receives every packet between two addresses, and its owner filters.
//! The kernel does not respond as long as it has no SCTP. Socket hooks do not run for it.

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

use super::sctp_packet::{self, Chunk, Packet};

/// Size of receive buffers; our packets are much shorter.
const LONGEST: usize = 2_048;
/// Source ports: the kernel's ephemeral range.
const PORTS: std::ops::Range<u16> = 32_768..60_999;

/// Sends an INIT, aborts the association after the response, and returns the server's answer.
///
/// # Errors
/// The ICMP error about the INIT, as a connected socket would receive it; `ConnectionAborted`: the
/// port is closed; `TimedOut`: no response; `InvalidData`: an invalid response to this INIT.
pub(super) fn request(server: SocketAddr, timeout: Duration) -> IoResult<String> {
    let deadline = Instant::now() + timeout;
    let handshake = Handshake::new(server)?;
    handshake.send(0, Chunk::Init { tag: handshake.tag })?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(handshake.socket.as_fd(), PollFlags::POLLIN)], timeout)?;
        handshake.check_error_queue()?;
        while let Some(bytes) = handshake.receive()? {
            let Some((peer, answer)) = handshake.parse_response(&bytes)? else { continue };
            // without ABORT every node on the path keeps a half-open association
            handshake.send(peer, Chunk::Abort)?;
            return Ok(answer);
        }
    }
}

/// An INIT without response so far.
struct Handshake {
    socket: OwnedFd,
    server: SocketAddr,
    port: u16,
    /// The verification tag of the response.
    tag: u32,
}

impl Handshake {
    fn new(server: SocketAddr) -> IoResult<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let random = RandomState::new().build_hasher().finish();
        let number = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(std::process::id() as u16);
        let port = PORTS.start + number % (PORTS.end - PORTS.start);
        let socket = raw(server.ip(), SockFlag::SOCK_NONBLOCK)?;
        // an error then comes with the packet it is about: other handshakes between the same
        // addresses get theirs, too
        match server {
            SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?,
            SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?,
        }
        connect(socket.as_raw_fd(), &to(server.ip()))?;
        // tag zero is reserved for INIT
        Ok(Self { socket, server, port, tag: random as u32 | 1 })
    }

    fn send(&self, tag: u32, chunk: Chunk) -> IoResult<()> {
        let bytes = Packet { from: self.port, to: self.server.port(), tag, chunk }.write();
        loop {
            match send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()) {
                // an error about another handshake between the same two addresses
                Err(Errno::ECONNREFUSED) => {}
                // dropped by a program on egress: reported only with RECVERR, a normal socket would
                // time out
                Ok(_) | Err(Errno::ENOBUFS) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next packet; it may belong to another handshake.
    fn receive(&self) -> IoResult<Option<Vec<u8>>> {
        let mut buffer = [0; LONGEST];
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, None, MsgFlags::empty());
        let read = message.map(|message| message.bytes);
        match read {
            Ok(len) => Ok(Some(transport(self.server.ip(), &buffer[..len]).to_vec())),
            Err(Errno::EAGAIN) => Ok(None),
            // as above: errors of this handshake are in the error queue
            Err(Errno::ECONNREFUSED) => Ok(Some(Vec::new())),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the ICMP error about this handshake, if there is one.
    fn check_error_queue(&self) -> IoResult<()> {
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
            let is_this_handshake =
                sctp_packet::ports(&buffer[..len]) == Some((self.port, self.server.port()));
            if let Some(number) = number.filter(|_| is_this_handshake) {
                return Err(Error::from_raw_os_error(number));
            }
        }
    }

    /// Verification tag and content of the response; `None`: it belongs to another handshake.
    fn parse_response(&self, bytes: &[u8]) -> IoResult<Option<(u32, String)>> {
        let Some((from, _)) = sctp_packet::ports(bytes).filter(|(_, to)| *to == self.port) else {
            return Ok(None);
        };
        let wrong = |what: &str| Error::new(ErrorKind::InvalidData, what.to_owned());
        if from != self.server.port() {
            return Err(wrong(&format!("response from port {from}")));
        }
        let packet = Packet::read(bytes).map_err(wrong)?;
        match packet.chunk {
            // our own INIT
            Chunk::Init { tag } if packet.tag == 0 && tag == self.tag => {
                Err(wrong("our own INIT was returned"))
            }
            _ if packet.tag != self.tag => Err(wrong(&format!("response with tag {:#x}", packet.tag))),
            Chunk::InitAck { tag, answer } => Ok(Some((tag, answer))),
            Chunk::Abort => Err(ErrorKind::ConnectionAborted.into()),
            Chunk::Init { .. } | Chunk::Other(_) => {
                Err(wrong(&format!("unexpected response {:?}", packet.chunk)))
            }
        }
    }
}

/// A server that answers INITs at `port` of any address with its name and the client's address, and
/// aborts all others.
pub(super) struct Server {
    socket: OwnedFd,
    any: IpAddr,
}

impl Server {
    /// A server for each family.
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
            // ignore packets that are invalid or no INIT
            let Ok(Packet { from, to, tag: 0, chunk: Chunk::Init { tag } }) = Packet::read(&bytes) else {
                continue;
            };
            let chunk = if to == port {
                Chunk::InitAck { tag: !tag | 1, answer: format!("{name} {}", SocketAddr::new(client, from)) }
            } else {
                Chunk::Abort
            };
            let answer = Packet { from: to, to: from, tag, chunk }.write();
            // the client reports a lost response
            let _unsent = self.answer(own, client, &answer);
        }
    }

    /// Client, own address and SCTP packet.
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
        // IPv4 packets begin with the IP header
        let header = packet.get(16..20).and_then(|octets| <[u8; 4]>::try_from(octets).ok());
        let own = if self.any.is_ipv4() { header.map(IpAddr::from) } else { info };
        let transport = transport(self.any, packet).to_vec();
        Ok(client.zip(own).map(|(client, own)| (client, own, transport)))
    }

    /// Sends from the address that the client used.
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

/// An address with port 0: raw sockets have none.
fn to(ip: IpAddr) -> SockaddrStorage {
    SocketAddr::new(ip, 0).into()
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip())))
}

/// The SCTP packet: without the IP header, which only IPv4 sockets receive.
fn transport(family: IpAddr, packet: &[u8]) -> &[u8] {
    let header = match packet.first() {
        Some(first) if family.is_ipv4() => usize::from(first & 0xf) * 4,
        _ => 0,
    };
    packet.get(header..).unwrap_or_default()
}
