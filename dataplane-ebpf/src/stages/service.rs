//! Services: finds the frontend a packet or socket is addressed to, and selects a backend.

use dataplane_common::{
    abi::{Addr, BackendSlot, Port, Route, Scope, Service, ServiceFlags, ServiceKey},
    flow::tcp_flags,
    hash,
    net::Protocol,
    reason::DropReason,
};

use super::affinity;
use crate::{
    global::{self, PackedResult},
    maps,
    scratch::{self, FrontendQuery, Scratch},
};

/// Reads of a row before it counts as broken: once more after a torn read, because two in a row are
/// not expected.
const READ_ATTEMPTS: u32 = 2;

/// Whether the packet is addressed to a frontend. Then `scratch.service` is its row.
#[inline(always)]
pub(crate) fn lookup_frontend(scratch: &mut Scratch) -> Result<bool, DropReason> {
    // there is only one reason: the verifier would follow every number that might be one
    global::call(scratch, || find_packets_frontend()).unpack().map_err(|_broken| DropReason::BadService)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_packets_frontend() -> u32 {
    let Some(Scratch { tuple, frontend_query, service, .. }) = scratch::current() else {
        return DropReason::WriteFailed.number().into();
    };
    let found = find_frontend(&tuple.dst, tuple.dst_port, tuple.protocol, *frontend_query, service);
    PackedResult::from(found).raw()
}

/// Finds the frontend at an address and port. True if there is one: then `service` is a copy of its
/// row.
#[inline(always)]
pub(crate) fn find_frontend(
    addr: &Addr,
    port: Port,
    protocol: u8,
    query: FrontendQuery,
    service: &mut Service,
) -> Result<bool, DropReason> {
    if !Protocol::has_ports(protocol) {
        return Ok(false);
    }
    let mut key = ServiceKey { addr: *addr, port, protocol, scope: Scope::Any as u8 };
    let mut found = read_row(&key, service)?;
    if !found && query.match_node_ports != 0 {
        key = key.at_node();
        found = read_row(&key, service)?;
    }
    if found && query.from_outside != 0 && service.flags & ServiceFlags::OUTSIDE != 0 {
        key.scope = Scope::Outside as u8;
        // not there yet: the agent is about to write it, and the row for all clients applies until
        // then
        read_row(&key, service)?;
    }
    Ok(found)
}

/// Copies the row of a frontend, if there is one.
#[inline(always)]
fn read_row(key: &ServiceKey, service: &mut Service) -> Result<bool, DropReason> {
    for _ in 0..READ_ATTEMPTS {
        if !maps::copy_service(key, service) {
            return Ok(false);
        }
        if service.is_intact(key) {
            return Ok(true);
        }
    }
    Err(DropReason::BadService)
}

/// Selects a backend for the packet's client: with session affinity the one it had, otherwise the
/// one at `hash`.
#[inline(always)]
pub(crate) fn select_packets_backend(
    scratch: &mut Scratch,
    hash: u32,
) -> Result<&'static BackendSlot, DropReason> {
    let slot = match slot_of(&scratch.service, &scratch.tuple.src, hash)? {
        Some(slot) => slot,
        None => scratch::with_scratch_released(scratch, || select_packets_slot(hash)),
    };
    maps::backend(slot).ok_or(DropReason::BadService)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn select_packets_slot(hash: u32) -> u32 {
    // no such slot: `BadService`
    scratch::current()
        .map_or(u32::MAX, |scratch| affinity::select_slot(&scratch.service, &scratch.tuple.src, hash))
}

/// As [`select_packets_backend`], for the client of a socket.
#[inline(always)]
pub(crate) fn select_backend(
    service: &Service,
    client: &Addr,
    hash: u32,
) -> Result<&'static BackendSlot, DropReason> {
    let slot = match slot_of(service, client, hash)? {
        Some(slot) => slot,
        None => {
            #[inline(never)]
            fn outlined(service: &Service, client: &Addr, hash: u32) -> u32 {
                affinity::select_slot(service, client, hash)
            }
            outlined(service, client, hash)
        }
    };
    maps::backend(slot).ok_or(DropReason::BadService)
}

/// The slot of the backend at `hash`; `None`: session affinity decides.
#[inline(always)]
fn slot_of(service: &Service, client: &Addr, hash: u32) -> Result<Option<u32>, DropReason> {
    if service.count == 0 {
        let local = service.flags & ServiceFlags::LOCAL != 0;
        return Err(if local { DropReason::NoLocalBackend } else { DropReason::NoBackend });
    }
    let hash = if service.affinity_timeout == 0 {
        hash
    } else if service.flags & ServiceFlags::HASH != 0 {
        // Maglev: hashing only the client is affinity without state, and the same on every node
        hash::client(*client)
    } else {
        return Ok(None);
    };
    Ok(Some(service.first_slot + hash::scale(hash, service.count)))
}

/// Whether the packet is a TCP segment other than the initial SYN.
#[inline(always)]
pub(crate) fn is_mid_connection(scratch: &Scratch) -> bool {
    scratch.tuple.protocol == Protocol::TCP && !tcp_flags::is_initial_syn(scratch.transport as u8)
}

/// Whether direct server return applies: the client is outside of the cluster, and the backend on
/// another node, which translates the packet and answers the client.
#[inline(always)]
pub(crate) fn uses_direct_return(service: &Service, backend: &BackendSlot, scratch: &Scratch) -> bool {
    if service.flags & ServiceFlags::DSR == 0
        || scratch.frontend_query.from_outside == 0
        || maps::endpoint(&backend.addr).is_some()
    {
        return false;
    }
    // a client in the cluster would get its packet back, or an answer through the tunnel that does
    // not belong to the node that sends it
    maps::route(&backend.addr).is_some_and(Route::is_node)
        && !maps::route(&scratch.tuple.src).is_some_and(Route::is_node)
}

/// Whether the source must become the node's address, so that the reply comes back to this node.
#[inline(always)]
pub(crate) fn needs_snat(service: &Service, backend: &BackendSlot, scratch: &Scratch) -> bool {
    // hairpin: a pod that is its own backend would drop a packet from its own address
    if backend.addr == scratch.tuple.src {
        return true;
    }
    // a backend on this node replies through this node, and sees the client's address
    scratch.frontend_query.from_outside != 0
        && service.flags & ServiceFlags::LOCAL == 0
        && maps::endpoint(&backend.addr).is_none()
}
