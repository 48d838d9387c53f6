//! Sends datagrams as fragments in an order that no kernel uses: with raw sockets, from the port of
//! a normal UDP socket, which receives the responses.

use std::{
    io::{Error, ErrorKind, Result as IoResult},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicU32, Ordering},
};

use dataplane_common::checksum;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};

use crate::prog::pseudo_sum;

const UDP: u8 = 17;
/// IPv6 next header: fragment header.
const FRAGMENT: u8 = 44;
const UDP_HEADER: usize = 8;
const HOP_LIMIT: u8 = 64;
/// Bytes of a datagram in each fragment but the last, with the UDP header: a multiple of 8 that
/// fits the minimum IPv6 MTU.
const PART: usize = 1_232;

/// Order in which the fragments of a datagram are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Order {
    /// First to last, as kernels do
    Forwards,
    /// Last to first
    Backwards,
}

/// Sends a datagram from this source port.
pub(super) fn send(server: SocketAddr, order: Order, port: u16, payload: &[u8]) -> IoResult<()> {
    let source = SocketAddr::new(own_address(server)?, port);
    let datagram = datagram(source, server, payload)?;
    let mut packets = fragments(source.ip(), server.ip(), &datagram, next_id());
    if order == Order::Backwards {
        packets.reverse();
    }
    let family = if server.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    // with this protocol the sender writes the IP header
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    let to: SockaddrStorage = SocketAddr::new(server.ip(), 0).into();
    packets.iter().try_for_each(|packet| {
        sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty())?;
        Ok(())
    })
}

/// A new fragment ID. Processes use different IDs, as fragments of an earlier one may still be in
/// flight.
fn next_id() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    std::process::id().wrapping_mul(64).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The source address that the kernel selects.
fn own_address(server: SocketAddr) -> IoResult<IpAddr> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    Ok(socket.local_addr()?.ip())
}

fn datagram(source: SocketAddr, server: SocketAddr, payload: &[u8]) -> IoResult<Vec<u8>> {
    let length = payload.len() + UDP_HEADER;
    let written = u16::try_from(length).map_err(|_too_long| Error::from(ErrorKind::InvalidInput))?;
    let mut bytes = Vec::with_capacity(length);
    for field in [source.port(), server.port(), written, 0] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(payload);
    let pseudo = pseudo_sum(source.ip(), server.ip(), UDP, length);
    // zero means no checksum
    let sum = match !checksum::fold(checksum::sum(&bytes) + pseudo) {
        0 => 0xffff,
        sum => sum,
    };
    bytes[6..UDP_HEADER].copy_from_slice(&sum.to_ne_bytes());
    Ok(bytes)
}

/// The fragments of a datagram, in order.
fn fragments(source: IpAddr, destination: IpAddr, datagram: &[u8], id: u32) -> Vec<Vec<u8>> {
    let parts = datagram.chunks(PART).enumerate();
    let fragment = |(index, part): (usize, &[u8])| {
        let at = index * PART;
        let more = at + part.len() < datagram.len();
        let mut packet = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                // 3 bits of flags, the lowest of which is "more fragments", above the offset in
                // units of 8 bytes
                let offset = (at / 8) as u16 | u16::from(more) << 13;
                let length = 20 + part.len() as u16;
                // the kernel fills in the checksum
                let mut header = vec![0x45, 0];
                for field in [length, id as u16, offset] {
                    header.extend(field.to_be_bytes());
                }
                header.extend([HOP_LIMIT, UDP, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header
            }
            _ => {
                let length = 8 + part.len() as u16;
                let mut header = vec![0x60, 0, 0, 0];
                header.extend(length.to_be_bytes());
                header.extend([FRAGMENT, HOP_LIMIT]);
                for address in [source, destination] {
                    header.extend(octets(address));
                }
                header.extend([UDP, 0]);
                // the offset in units of 8 bytes is above 3 bits
                header.extend((at as u16 | u16::from(more)).to_be_bytes());
                header.extend(id.to_be_bytes());
                header
            }
        };
        packet.extend(part);
        packet
    };
    parts.map(fragment).collect()
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}
