//! Frontend ports that the host also uses as source ports: replies reach the host's sockets. With
//! real sockets in a separate namespace.

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::{
    lab::wait,
    prog::{Action, Family, Frame, Rig, World, at, ip, rig},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const SLOT: u32 = 200;
const TIMEOUT: Duration = Duration::from_secs(10);

/// The addresses of the host and of an outside server are on the loopback device of the rig's
/// namespace. The host's port 40000 is a frontend of a pod.
fn node(family: Family) -> Result<(Rig, World, SocketAddr)> {
    let (mut rig, world) = rig(family)?;
    let bits = if family == Family::V4 { "32" } else { "128 nodad" };
    for address in [world.host, world.outside] {
        ip(&format!("addr add {address}/{bits} dev lo"))?;
        // the kernel adds the route of an IPv6 address later, in a work queue
        wait::until("the route of an address", TIMEOUT, || ip(&format!("route get {address}")).map(Some))?;
    }
    let frontend = at(world.host, 40_000);
    rig.host_with_frontends(world.host)?;
    rig.service(frontend, Protocol::TCP, SLOT, &[at(world.pod, 8080)], 0)?;
    Ok((rig, world, frontend))
}

#[test]
fn replies_to_a_host_socket_are_not_translated_as_requests() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family)?;
        let server = at(world.outside, 443);
        let listener = TcpListener::bind(server)?;
        let kind = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let client = socket(kind, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(client.as_raw_fd(), &SockaddrStorage::from(frontend))?;
        // as the routes, the source address of a new IPv6 address is usable only a moment later
        wait::until("a connection on loopback", TIMEOUT, || {
            connect(client.as_raw_fd(), &SockaddrStorage::from(server))?;
            Ok(Some(()))
        })?;
        let _accepted = listener.accept()?;

        for flags in [SYN_ACK, ACK] {
            let run = rig.run(HookId::FromWire, &Frame::tcp(server, frontend, flags).build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
            assert_eq!(run.packet().tuple(), (server, frontend));
        }
        // a SYN is a request to the frontend, although a host socket uses the port
        let new_client = at(world.outside, 444);
        let run = rig.run(HookId::FromWire, &Frame::tcp(new_client, frontend, SYN).build())?;
        assert_eq!((run.outcome, run.packet().dst), ("to_pod", world.pod));
        // and so is an ACK of a connection that no host socket has
        let midway = at(world.outside, 445);
        let run = rig.run(HookId::FromWire, &Frame::tcp(midway, frontend, ACK).build())?;
        assert_eq!((run.outcome, run.packet().dst), ("to_pod", world.pod));
    }
    Ok(())
}

/// A host process that listens on a frontend's port gets no packets: as with kube-proxy, the
/// frontend has precedence.
#[test]
fn frontend_has_precedence_over_a_listening_host_socket() -> Result<()> {
    let (mut rig, world, frontend) = node(Family::V4)?;
    let _listener = TcpListener::bind(frontend)?;
    for flags in [SYN, ACK] {
        let client = at(world.outside, 40_000 + u16::from(flags));
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, flags).build())?;
        assert_eq!((run.outcome, run.packet().dst), ("to_pod", world.pod));
    }
    Ok(())
}
