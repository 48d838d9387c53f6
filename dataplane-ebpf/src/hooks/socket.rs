//! A process uses a service's address: the cgroup hooks of `connect`, `sendmsg`, `recvmsg`,
//! `getpeername` and `close`.
//!
//! The socket gets a backend in place of the frontend once, and its packets need no translation
//! after that. The frontend is remembered, so that the application never sees the backend's address
//! (ADR 0003).

use aya_ebpf::programs::SockContext;
use dataplane_common::{
    abi::{
        Addr, BackendSlot, ConnectedPeer, Endpoint, NodeFlags, OriginKey, Port, Service, ServiceFlags,
        SocketOrigin,
    },
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

/// Backends that `sendmsg()` tries after the first, if answers of that one have another frontend's
/// address: a bound for the verifier.
const OTHER_BACKENDS: u32 = 3;

/// `connect()`: the socket gets a backend, which it keeps until either is gone.
#[inline(always)]
pub(crate) fn connect(socket: &Socket<'_>) -> i32 {
    verdict::record_socket(HookId::Connect, try_connect(socket))
}

#[inline(always)]
fn try_connect(socket: &Socket<'_>) -> Result<Verdict, DropReason> {
    let service = &mut Service::default();
    if let Some(frontend) = find_frontend(socket, Call::Connect, service)? {
        let backend = service::select_backend(service, &frontend.client, random::random())?;
        let origin = frontend.origin(service, backend);
        if socket.set(&origin.backend, origin.backend_port) {
            socket.set_origin(origin);
            // TCP notices that its backend is gone; a UDP socket does not, so the agent closes it
            if socket.protocol() == Protocol::UDP {
                maps::store_peer(socket.cookie(), &peer(socket, &origin));
            }
            return Ok(Verdict::SocketTranslated);
        }
    }
    // the socket may have been connected to a service before, and now connects to the backend
    // itself
    socket.remove_origin();
    if socket.protocol() == Protocol::UDP {
        maps::remove_peer(socket.cookie());
    }
    Ok(Verdict::SocketUntouched)
}

/// `sendmsg()` with an address: the same backend for every datagram, as long as the set of backends
/// does not change.
#[inline(always)]
pub(crate) fn sendmsg(socket: &Socket<'_>) -> i32 {
    verdict::record_socket(HookId::Sendmsg, try_sendmsg(socket))
}

#[inline(always)]
fn try_sendmsg(socket: &Socket<'_>) -> Result<Verdict, DropReason> {
    // the kernel delivers answers of the connected backend only
    if let Some(origin) = socket.origin()
        && origin.frontend == socket.addr()
        && origin.frontend_port == socket.port()
        && socket.is_connected_to(&origin.backend, origin.backend_port)
        && socket.set(&origin.backend, origin.backend_port)
    {
        return Ok(Verdict::SocketTranslated);
    }
    let service = &mut Service::default();
    let Some(frontend) = find_frontend(socket, Call::Sendmsg, service)? else {
        return Ok(Verdict::SocketUntouched);
    };
    let cookie = socket.cookie();
    let hash = hash::finish(cookie as u32 ^ (cookie >> 32) as u32);
    let mut origin = frontend.origin(service, service::select_backend(service, &frontend.client, hash)?);
    for next in 1..=OTHER_BACKENDS {
        if !has_other_frontend(socket, cookie, &origin) {
            break;
        }
        // the packets pass a device hook, which gives their flow a source port of its own
        if !frontend.stays_in_host {
            return Ok(Verdict::SocketUntouched);
        }
        if service.affinity_timeout != 0 || next >= service.count {
            break;
        }
        let slot = service.first_slot + (hash::scale(hash, service.count) + next) % service.count;
        origin = frontend.origin(service, maps::backend(slot).ok_or(DropReason::BadService)?);
    }
    if !socket.set(&origin.backend, origin.backend_port) {
        return Ok(Verdict::SocketUntouched);
    }
    maps::store_datagram_origin(&origin_key(cookie, &origin), &origin);
    Ok(Verdict::SocketTranslated)
}

/// Whether answers of the backend have the address of another frontend on this socket: of its
/// `connect()`, or of an earlier `sendmsg()`.
#[inline(always)]
fn has_other_frontend(socket: &Socket<'_>, cookie: u64, origin: &SocketOrigin) -> bool {
    socket.is_connected_to(&origin.backend, origin.backend_port)
        || maps::datagram_origin(&origin_key(cookie, origin)).is_some_and(|other| {
            other.frontend != origin.frontend || other.frontend_port != origin.frontend_port
        })
}

/// `recvmsg()`: the source of a datagram from the backend becomes the frontend. That of a connected
/// socket's peer is the frontend of its `connect()`, whatever the socket sent to others.
#[inline(always)]
pub(crate) fn recvmsg(socket: &Socket<'_>) -> i32 {
    let (addr, port) = (socket.addr(), socket.port());
    let origin = if socket.is_connected_to(&addr, port) {
        connected_origin(socket, socket.origin())
    } else {
        maps::datagram_origin(&OriginKey { cookie: socket.cookie(), backend: addr, port, reserved: [0; 6] })
    };
    verdict::record_socket(HookId::Recvmsg, Ok(restore(socket, origin)))
}

/// `getpeername()`: the peer of a translated socket is the frontend.
#[inline(always)]
pub(crate) fn getpeername(socket: &Socket<'_>) -> i32 {
    let origin = connected_origin(socket, socket.origin().or_else(|| socket.subflow_origin()));
    verdict::record_socket(HookId::Getpeername, Ok(restore(socket, origin)))
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

/// The call that a program runs for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Connect,
    Sendmsg,
}

/// The frontend that an address is replaced for.
struct Frontend {
    addr: Addr,
    port: Port,
    /// The client, for session affinity.
    client: Addr,
    /// Packets to it pass no device hook: this is the only place to translate them.
    stays_in_host: bool,
}

impl Frontend {
    #[inline(always)]
    fn origin(&self, service: &Service, backend: &BackendSlot) -> SocketOrigin {
        SocketOrigin {
            frontend: self.addr,
            backend: backend.addr,
            frontend_port: self.port,
            backend_port: backend.port,
            service_id: service.id,
        }
    }
}

/// The frontend at the address of the call, if the socket is to get one of its backends instead.
/// Then `service` is its row, which has a backend.
#[inline(always)]
fn find_frontend(
    socket: &Socket<'_>,
    call: Call,
    service: &mut Service,
) -> Result<Option<Frontend>, DropReason> {
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
    if !service::find_frontend(&addr, port, protocol, query, service)? {
        return Ok(None);
    }
    // packets from the host to one of its own addresses pass no device hook
    let stays_in_host = in_host_netns
        && (is_loopback
            || endpoint.is_some_and(Endpoint::is_host)
            || service.flags & ServiceFlags::HOST_BACKEND != 0);
    // a host's datagrams that pass a device hook are translated there: if one socket uses both,
    // each answer has the address of its own frontend
    let is_left_to_packets = !enabled || (in_host_netns && call == Call::Sendmsg);
    if is_left_to_packets && !stays_in_host {
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
    Ok(Some(Frontend { addr, port, client, stays_in_host }))
}

/// The origin of a connected socket, if the address of the call is its backend's.
#[inline(always)]
fn connected_origin(socket: &Socket<'_>, origin: Option<SocketOrigin>) -> Option<SocketOrigin> {
    origin.filter(|origin| origin.backend == socket.addr() && origin.backend_port == socket.port())
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
        reserved: 0,
        service_id: origin.service_id,
    }
}

#[inline(always)]
fn origin_key(cookie: u64, origin: &SocketOrigin) -> OriginKey {
    OriginKey { cookie, backend: origin.backend, port: origin.backend_port, reserved: [0; 6] }
}
