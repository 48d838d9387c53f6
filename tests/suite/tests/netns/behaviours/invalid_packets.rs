//! "proxy implementation should not be vulnerable to the invalid conntrack state bug": an
//! out-of-window segment of the server is translated like any other of its connection. If it had
//! the server's own address, the client would reply with RST, which ends the connection
//! (kubernetes/kubernetes#74839).

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
    service_fixture::ServiceFixture,
    testbed::{Mode, on},
};

const TIMEOUT: Duration = Duration::from_secs(10);
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
/// Sequence number of the out-of-window segment; both ends are at a few bytes.
const SEQUENCE: u32 = 0x7a7a_7a7a;

/// A raw socket that receives all TCP segments of a namespace and sends crafted ones.
struct Raw {
    socket: OwnedFd,
    family: Family,
}

/// A received segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    src: SocketAddr,
    dst_port: u16,
    sequence: u32,
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

    /// Sends a segment; the kernel writes the IP header.
    fn send(&self, from: SocketAddr, to: SocketAddr) -> Result<()> {
        let headers = match self.family {
            Family::V4 => 14 + 20,
            Family::V6 => 14 + 40,
        };
        // the frame is built with sequence number 1: adjust the checksum for the change
        let mut segment =
            Frame { payload: Vec::new(), ..Frame::tcp(from, to, ACK) }.build().split_off(headers);
        segment[4..8].copy_from_slice(&SEQUENCE.to_be_bytes());
        let sum = u16::from_be_bytes([segment[16], segment[17]]);
        let change = (SEQUENCE >> 16) + (SEQUENCE & 0xffff) + u32::from(!1_u16) + u32::from(!sum);
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

    /// The segments received since the last call.
    fn receive(&self) -> Result<Vec<Segment>> {
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
            let sequence = u32::from(word(4)) << 16 | u32::from(word(6));
            segments.push(Segment {
                src: SocketAddr::new(src, word(0)),
                dst_port: word(2),
                sequence,
                flags: bytes[13],
            });
        }
    }
}

#[test]
fn proxy_implementation_should_not_be_vulnerable_to_the_invalid_conntrack_state_bug() -> Result<()> {
    on(Mode::PerPacket, |testbed| {
        let mut fixture = ServiceFixture::of("boom-server", 48, &[&testbed.webs[1]]);
        fixture.service["spec"]["ports"] =
            json!([{"name": "echo", "port": 7, "protocol": "TCP", "targetPort": ECHO}]);
        fixture.slices.iter_mut().for_each(|slice| {
            slice["ports"] = json!([{"name": "echo", "port": ECHO, "protocol": "TCP"}]);
        });
        testbed.apply_service(&fixture)?;
        for family in Family::BOTH {
            let (client, server) = (testbed.clients[0].place().namespace(), &testbed.webs[1]);
            let service = fixture.at(family, 7);
            let mut stream = client.enter(|| TcpStream::connect_timeout(&service, TIMEOUT))??;
            stream.set_read_timeout(Some(TIMEOUT))?;
            let mut greeting = [0; 6];
            stream.read_exact(&mut greeting)?;
            ensure!(greeting == *b"web-1\n", "{greeting:?}");
            let port = stream.local_addr()?.port();

            let at_client = Raw::open(client, family)?;
            let at_server = Raw::open(server.place().namespace(), family)?;
            let to = SocketAddr::new(testbed.clients[0].address(family), port);
            at_server.send(server.echo(family), to)?;
            let mut received = Vec::new();
            wait::until("the segment", TIMEOUT, || {
                received.extend(at_client.receive()?);
                Ok(received.iter().any(|segment| segment.sequence == SEQUENCE).then_some(()))
            })?;
            let strays: Vec<_> =
                received.iter().filter(|it| it.dst_port == port && it.src != service).collect();
            ensure!(strays.is_empty(), "{strays:?} did not come from {service}");

            // the connection still works
            for line in [b"one\n", b"two\n"] {
                stream.write_all(line)?;
                let mut echo = [0; 4];
                stream.read_exact(&mut echo)?;
                ensure!(echo == *line, "{echo:?}");
            }
            let answers = at_server.receive()?;
            ensure!(
                answers.iter().any(|it| it.src == to),
                "the server received nothing from the client: {answers:?}"
            );
            let resets: Vec<_> = answers.iter().filter(|it| it.src == to && it.flags & RST != 0).collect();
            ensure!(resets.is_empty(), "the client sent RST: {resets:?}");
        }
        testbed.withdraw(&fixture)
    })
}
