//! A process names a service: the cgroup hooks of `connect`, `sendmsg`, `recvmsg`, `getpeername` and `close`.
//!
//! The socket gets a backend in place of the service, once, and its packets need no translation after that. What the
//! application named is kept, so that it never sees the backend's address (ADR 0003).

use aya_ebpf::programs::SockContext;
use dataplane_common::{
    abi::{ConnectedPeer, Endpoint, NodeFlags, OriginKey, Service, ServiceFlags, SocketOrigin},
    hash,
    net::Protocol,
    reason::{DropReason, Hook, Verdict},
};

use crate::{
    config,
    maps::{self, Asks},
    skb::{self, Socket},
    stages::service,
    verdict,
};

/// `connect()`: the socket gets one backend for its life, or for the backend's.
#[inline(always)]
pub(crate) fn connect(socket: &Socket<'_>) -> i32 {
    let result = translate(socket, skb::random()).map(|origin| match origin {
        Some(origin) => {
            socket.set_origin(origin);
            // a TCP connection ends with its backend; nobody tells a UDP socket, but the agent
            if socket.protocol() == Protocol::UDP {
                maps::remember_peer(socket.cookie(), &peer(socket, &origin));
            }
            Verdict::SocketTranslated
        }
        None => {
            // it may have been connected to a service before
            if socket.protocol() == Protocol::UDP {
                maps::forget_peer(socket.cookie());
            }
            Verdict::SocketUntouched
        }
    });
    verdict::socket(Hook::Connect, result)
}

/// `sendmsg()` on an unconnected socket: the same backend for every datagram, as long as the backends stay the same.
#[inline(always)]
pub(crate) fn sendmsg(socket: &Socket<'_>) -> i32 {
    let cookie = socket.cookie();
    let result =
        translate(socket, hash::finish(cookie as u32 ^ (cookie >> 32) as u32)).map(|origin| match origin {
            Some(origin) => {
                maps::remember_datagram_origin(&origin_key(cookie, &origin), &origin);
                Verdict::SocketTranslated
            }
            None => Verdict::SocketUntouched,
        });
    verdict::socket(Hook::Sendmsg, result)
}

/// `recvmsg()`: a datagram from the backend is shown as one from the service.
#[inline(always)]
pub(crate) fn recvmsg(socket: &Socket<'_>) -> i32 {
    let key =
        OriginKey { cookie: socket.cookie(), backend: socket.addr(), port: socket.port(), reserved: [0; 6] };
    let origin = maps::datagram_origin(&key).or_else(|| connected(socket));
    verdict::socket(Hook::Recvmsg, Ok(restore(socket, origin)))
}

/// `getpeername()`: the peer of a translated socket is the service.
#[inline(always)]
pub(crate) fn getpeername(socket: &Socket<'_>) -> i32 {
    verdict::socket(Hook::Getpeername, Ok(restore(socket, connected(socket))))
}

/// `close()`: what was remembered of the socket goes with it. Nothing to count: nobody asked for anything.
#[inline(always)]
pub(crate) fn release(ctx: &SockContext) -> i32 {
    let (protocol, cookie) = skb::closing(ctx);
    if protocol == Protocol::UDP {
        maps::forget_peer(cookie);
    }
    1
}

/// Replaces the address of a service by one of its backends, and returns both.
#[inline(always)]
fn translate(socket: &Socket<'_>, random: u32) -> Result<Option<SocketOrigin>, DropReason> {
    let (addr, port, protocol) = (socket.addr(), socket.port(), socket.protocol());
    let enabled = match protocol {
        Protocol::TCP => config::flag(NodeFlags::CONNECT_TCP),
        Protocol::UDP => config::flag(NodeFlags::CONNECT_UDP),
        _ => false,
    };
    let of_host = socket.netns() == config::host_netns();
    // as an address to connect to, none at all means loopback
    let is_loopback = addr.is_loopback() || addr.is_unspecified();
    // a pod's loopback is its own
    if !of_host && (!enabled || is_loopback) {
        return Ok(None);
    }
    let takes_loopback = of_host && config::flag(NodeFlags::LOOPBACK_NODE_PORTS);
    if addr.is_unspecified() && !takes_loopback {
        return Ok(None);
    }
    let endpoint = maps::endpoint(&addr);
    if !enabled && !of_host {
        return Ok(None);
    }
    let node_ports = match endpoint {
        Some(endpoint) => endpoint.has_node_ports(),
        None => is_loopback && takes_loopback,
    };
    let asks = Asks { from_outside: 0, node_ports: u32::from(node_ports), of_another: 0 };
    let service = &mut Service::default();
    if !service::frontend(&addr, port, protocol, asks, service)? {
        return Ok(None);
    }
    // what the host's own processes send to an address of the host never leaves it: nobody else will translate it
    let on_host = of_host
        && (is_loopback
            || endpoint.is_some_and(Endpoint::is_host)
            || service.flags & ServiceFlags::HOST_BACKEND != 0);
    if !enabled && !on_host {
        return Ok(None);
    }
    // without a backend it is the packets that are refused or dropped. A consistent choice needs their source, which a
    // socket does not have yet; where nobody sees the packets it is left to chance
    if service.count == 0 || (service.flags & ServiceFlags::HASH != 0 && !on_host) {
        return Ok(None);
    }
    // so does what depends on the client; but a process of the host is its node
    let wants_client = service.affinity_timeout != 0 || service.flags & ServiceFlags::SOURCE_RANGES != 0;
    if wants_client && !of_host {
        return Ok(None);
    }
    let client = if addr.is_v4() { config::ipv4() } else { config::ipv6() };
    if service.flags & ServiceFlags::SOURCE_RANGES != 0 && !maps::is_source_allowed(service.id, &client) {
        return Ok(None);
    }
    let backend = service::select(service, &client, random)?;
    if !socket.set(&backend.addr, backend.port) {
        return Ok(None);
    }
    Ok(Some(SocketOrigin {
        frontend: addr,
        backend: backend.addr,
        frontend_port: port,
        backend_port: backend.port,
        reserved: 0,
    }))
}

/// The origin of a connected socket, if the address at hand is its backend's.
#[inline(always)]
fn connected(socket: &Socket<'_>) -> Option<SocketOrigin> {
    socket.origin().filter(|origin| origin.backend == socket.addr() && origin.backend_port == socket.port())
}

#[inline(always)]
fn restore(socket: &Socket<'_>, origin: Option<SocketOrigin>) -> Verdict {
    match origin {
        Some(origin) if socket.set(&origin.frontend, origin.frontend_port) => Verdict::SocketRestored,
        _ => Verdict::SocketUntouched,
    }
}

#[inline(always)]
fn peer(socket: &Socket<'_>, origin: &SocketOrigin) -> ConnectedPeer {
    ConnectedPeer {
        backend: origin.backend,
        netns: socket.netns(),
        port: origin.backend_port,
        reserved: [0; 6],
    }
}

#[inline(always)]
fn origin_key(cookie: u64, origin: &SocketOrigin) -> OriginKey {
    OriginKey { cookie, backend: origin.backend, port: origin.backend_port, reserved: [0; 6] }
}
