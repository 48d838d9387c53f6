//! A process uses a service's address: the cgroup hooks of `connect`, `sendmsg`, `recvmsg`,
//! `getpeername` and `close`.
//!
//! The socket gets a backend in place of the frontend once, and its packets need no translation
//! after that. The frontend is remembered, so that the application never sees the backend's address
//! (ADR 0003).

use aya_ebpf::programs::SockContext;
use dataplane_common::{
    abi::{ConnectedPeer, Endpoint, NodeFlags, OriginKey, Service, ServiceFlags, SocketOrigin},
    hash,
    net::Protocol,
    reason::{DropReason, HookId, Verdict},
};

use crate::{
    config,
    helpers::{
        random,
        socket::{self, Socket},
    },
    maps,
    scratch::FrontendQuery,
    stages::service,
    verdict,
};

/// `connect()`: the socket gets a backend, which it keeps until either is gone.
#[inline(always)]
pub(crate) fn connect(socket: &Socket<'_>) -> i32 {
    let result = translate(socket, random::random()).map(|origin| match origin {
        Some(origin) => {
            socket.set_origin(origin);
            // TCP notices that its backend is gone; a UDP socket does not, so the agent closes it
            if socket.protocol() == Protocol::UDP {
                maps::store_peer(socket.cookie(), &peer(socket, &origin));
            }
            Verdict::SocketTranslated
        }
        None => {
            // the socket may have been connected to a service before
            if socket.protocol() == Protocol::UDP {
                maps::remove_peer(socket.cookie());
            }
            Verdict::SocketUntouched
        }
    });
    verdict::record_socket(HookId::Connect, result)
}

/// `sendmsg()` on an unconnected socket: the same backend for every datagram, as long as the set of
/// backends does not change.
#[inline(always)]
pub(crate) fn sendmsg(socket: &Socket<'_>) -> i32 {
    let cookie = socket.cookie();
    let result =
        translate(socket, hash::finish(cookie as u32 ^ (cookie >> 32) as u32)).map(|origin| match origin {
            Some(origin) => {
                maps::store_datagram_origin(&origin_key(cookie, &origin), &origin);
                Verdict::SocketTranslated
            }
            None => Verdict::SocketUntouched,
        });
    verdict::record_socket(HookId::Sendmsg, result)
}

/// `recvmsg()`: the source of a datagram from the backend becomes the frontend.
#[inline(always)]
pub(crate) fn recvmsg(socket: &Socket<'_>) -> i32 {
    let key =
        OriginKey { cookie: socket.cookie(), backend: socket.addr(), port: socket.port(), reserved: [0; 6] };
    let origin = maps::datagram_origin(&key).or_else(|| connected_origin(socket));
    verdict::record_socket(HookId::Recvmsg, Ok(restore(socket, origin)))
}

/// `getpeername()`: the peer of a translated socket is the frontend.
#[inline(always)]
pub(crate) fn getpeername(socket: &Socket<'_>) -> i32 {
    verdict::record_socket(HookId::Getpeername, Ok(restore(socket, connected_origin(socket))))
}

/// `close()`: removes the socket from `CONNECTED_PEERS`. Not counted, because there is no outcome
/// to tell apart.
#[inline(always)]
pub(crate) fn release(ctx: &SockContext) -> i32 {
    let (protocol, cookie) = socket::closing(ctx);
    if protocol == Protocol::UDP {
        maps::remove_peer(cookie);
    }
    1
}

/// Replaces the address of a frontend by one of its backends. Returns both, or `None` if the
/// address was left alone.
#[inline(always)]
fn translate(socket: &Socket<'_>, random: u32) -> Result<Option<SocketOrigin>, DropReason> {
    let (addr, port, protocol) = (socket.addr(), socket.port(), socket.protocol());
    let enabled = match protocol {
        Protocol::TCP => config::flag(NodeFlags::CONNECT_TCP),
        Protocol::UDP => config::flag(NodeFlags::CONNECT_UDP),
        _ => false,
    };
    let in_host_netns = socket.netns() == config::host_netns();
    // connecting to 0.0.0.0 or :: means loopback
    let is_loopback = addr.is_loopback() || addr.is_unspecified();
    // a pod's loopback is the pod's own
    if !in_host_netns && (!enabled || is_loopback) {
        return Ok(None);
    }
    let node_ports_on_loopback = in_host_netns && config::flag(NodeFlags::LOOPBACK_NODE_PORTS);
    if addr.is_unspecified() && !node_ports_on_loopback {
        return Ok(None);
    }
    let endpoint = maps::endpoint(&addr);
    let match_node_ports = match endpoint {
        Some(endpoint) => endpoint.has_node_ports(),
        None => is_loopback && node_ports_on_loopback,
    };
    let query = FrontendQuery {
        from_outside: 0,
        match_node_ports: u32::from(match_node_ports),
        addr_of_other_node: 0,
    };
    let service = &mut Service::default();
    if !service::find_frontend(&addr, port, protocol, query, service)? {
        return Ok(None);
    }
    // packets from the host to one of its own addresses pass no device hook: this is the only place
    // to translate them
    let stays_in_host = in_host_netns
        && (is_loopback
            || endpoint.is_some_and(Endpoint::is_host)
            || service.flags & ServiceFlags::HOST_BACKEND != 0);
    if !enabled && !stays_in_host {
        return Ok(None);
    }
    // without a backend the packets are rejected or dropped. Maglev hashes the source, which a
    // socket does not have yet; a connection that stays in the host gets a random backend all the
    // same
    if service.count == 0 || (service.flags & ServiceFlags::HASH != 0 && !stays_in_host) {
        return Ok(None);
    }
    // affinity and source ranges need the client's address: that of a host process is the node's
    let needs_client = service.affinity_timeout != 0 || service.flags & ServiceFlags::SOURCE_RANGES != 0;
    if needs_client && !in_host_netns {
        return Ok(None);
    }
    let client = if addr.is_v4() { config::ipv4() } else { config::ipv6() };
    if service.flags & ServiceFlags::SOURCE_RANGES != 0 && !maps::is_source_allowed(service.id, &client) {
        return Ok(None);
    }
    let backend = service::select_backend(service, &client, random)?;
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

/// The origin of a connected socket, if the address of the call is its backend's.
#[inline(always)]
fn connected_origin(socket: &Socket<'_>) -> Option<SocketOrigin> {
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
