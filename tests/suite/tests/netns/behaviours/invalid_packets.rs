//! "proxy implementation should not be vulnerable to the invalid conntrack state bug": a segment outside of every window, from
//! the server, is one of its connection like any other: it reaches the client as from the service. If it came under the
//! server's own address, the client would answer with a reset, and the connection would be over (kubernetes/kubernetes#74839).

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    lab::{Family, Namespace, wait},
    prog::Frame,
    traffic::ECHO,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, recvfrom, sendto,
    socket,
};
use serde_json::json;

use super::{
    bed::{Mode, on},
    told::Told,
};

const PATIENCE: Duration = Duration::from_secs(10);
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
/// Of the segment that is outside of every window, in which both ends have seen a few bytes.
const NUMBER: u32 = 0x7a7a_7a7a;

/// Sees the TCP segments that arrive in a namespace, and sends some of its own making.
struct Raw {
    socket: OwnedFd,
    family: Family,
}

/// A segment that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    src: SocketAddr,
    dst_port: u16,
    number: u32,
    flags: u8,
}

impl Raw {
    fn open(namespace: &Namespace, family: Family) -> Result<Self> {
        let domain = match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = namespace.enter(|| socket(domain, SockType::Raw, flags, SockProtocol::Tcp))??;
        Ok(Self { socket, family })
    }

    /// The kernel writes the IP header.
    fn send(&self, from: SocketAddr, to: SocketAddr) -> Result<()> {
        let headers = match self.family {
            Family::V4 => 14 + 20,
            Family::V6 => 14 + 40,
        };
        // sequence and acknowledgement are 1 where it is built: a change of both is a change of the sum
        let mut segment =
            Frame { payload: Vec::new(), ..Frame::tcp(from, to, ACK) }.build().split_off(headers);
        segment[4..8].copy_from_slice(&NUMBER.to_be_bytes());
        let sum = u16::from_be_bytes([segment[16], segment[17]]);
        let change = (NUMBER >> 16) + (NUMBER & 0xffff) + u32::from(!1_u16) + u32::from(!sum);
        let folded = (change & 0xffff) + (change >> 16);
        let sum = !(((folded & 0xffff) + (folded >> 16)) as u16);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        match to {
            SocketAddr::V4(to) => sendto(
                self.socket.as_raw_fd(),
                &segment,
                &SockaddrIn::from(std::net::SocketAddrV4::new(*to.ip(), 0)),
                MsgFlags::empty(),
            ),
            SocketAddr::V6(to) => sendto(
                self.socket.as_raw_fd(),
                &segment,
                &SockaddrIn6::from(std::net::SocketAddrV6::new(*to.ip(), 0, 0, 0)),
                MsgFlags::empty(),
            ),
        }
        .context("send a segment")?;
        Ok(())
    }

    /// What has arrived since this was asked last.
    fn arrived(&self) -> Result<Vec<Segment>> {
        let mut segments = Vec::new();
        let mut buffer = vec![0; 65_536];
        loop {
            let (bytes, src): (&[u8], IpAddr) = match self.family {
                Family::V4 => match recvfrom::<SockaddrIn>(self.socket.as_raw_fd(), &mut buffer) {
                    Err(nix::errno::Errno::EAGAIN) => return Ok(segments),
                    got => {
                        let (length, from) = got?;
                        let header = usize::from(buffer[0] & 15) * 4;
                        (&buffer[header..length], from.context("a sender")?.ip().into())
                    }
                },
                Family::V6 => match recvfrom::<SockaddrIn6>(self.socket.as_raw_fd(), &mut buffer) {
                    Err(nix::errno::Errno::EAGAIN) => return Ok(segments),
                    got => {
                        let (length, from) = got?;
                        (&buffer[..length], from.context("a sender")?.ip().into())
                    }
                },
            };
            let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
            let number = u32::from(word(4)) << 16 | u32::from(word(6));
            segments.push(Segment {
                src: SocketAddr::new(src, word(0)),
                dst_port: word(2),
                number,
                flags: bytes[13],
            });
        }
    }
}

#[test]
fn proxy_implementation_should_not_be_vulnerable_to_the_invalid_conntrack_state_bug() -> Result<()> {
    on(Mode::ByPackets, |bed| {
        let mut told = Told::of("boom-server", 48, &[&bed.webs[1]]);
        told.service["spec"]["ports"] =
            json!([{"name": "echo", "port": 7, "protocol": "TCP", "targetPort": ECHO}]);
        told.slices.iter_mut().for_each(|slice| {
            slice["ports"] = json!([{"name": "echo", "port": ECHO, "protocol": "TCP"}]);
        });
        bed.tell(&told)?;
        for family in Family::BOTH {
            let (client, server) = (bed.clients[0].place().namespace(), &bed.webs[1]);
            let service = told.at(family, 7);
            let mut stream = client.enter(|| TcpStream::connect_timeout(&service, PATIENCE))??;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut greeting = [0; 6];
            stream.read_exact(&mut greeting)?;
            ensure!(greeting == *b"web-1\n", "{greeting:?}");
            let port = stream.local_addr()?.port();

            let at_client = Raw::open(client, family)?;
            let at_server = Raw::open(server.place().namespace(), family)?;
            let to = SocketAddr::new(bed.clients[0].address(family), port);
            at_server.send(server.echo(family), to)?;
            let mut heard = Vec::new();
            wait::until("the segment", PATIENCE, || {
                heard.extend(at_client.arrived()?);
                Ok(heard.iter().any(|segment| segment.number == NUMBER).then_some(()))
            })?;
            let strays: Vec<_> = heard.iter().filter(|it| it.dst_port == port && it.src != service).collect();
            ensure!(strays.is_empty(), "{strays:?} did not come from {service}");

            // the connection is as it was
            for line in [b"one\n", b"two\n"] {
                stream.write_all(line)?;
                let mut echo = [0; 4];
                stream.read_exact(&mut echo)?;
                ensure!(echo == *line, "{echo:?}");
            }
            let answers = at_server.arrived()?;
            ensure!(answers.iter().any(|it| it.src == to), "nothing was seen of the client: {answers:?}");
            let resets: Vec<_> = answers.iter().filter(|it| it.src == to && it.flags & RST != 0).collect();
            ensure!(resets.is_empty(), "the client has ended it: {resets:?}");
        }
        bed.withdraw(&told)
    })
}
