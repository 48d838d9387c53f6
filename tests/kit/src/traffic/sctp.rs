//! SCTP one-to-one sockets (RFC 6458 §4) with the interface of TCP sockets.
//!
//! An association announces every address of an endpoint to its peer, and address translation does
//! not change that list. Sockets here have one family, and a server has one address.

use std::{io::Result, net::SocketAddr};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

const BACKLOG: u32 = 128;

pub(super) async fn connect(server: SocketAddr) -> Result<TcpStream> {
    new(server)?.connect(server).await
}

pub(super) fn listen(at: SocketAddr) -> Result<TcpListener> {
    let socket = new(at)?;
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

fn new(of: SocketAddr) -> Result<TcpSocket> {
    let family = if of.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(family, SockType::Stream, flags, SockProtocol::Sctp)?;
    if of.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    Ok(TcpSocket::from_std_stream(socket.into()))
}
