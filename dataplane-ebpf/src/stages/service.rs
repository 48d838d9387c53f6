//! Services: which backend a packet or a socket gets.

use dataplane_common::{
    abi::{Addr, BackendSlot, FlowFlags, Port, Route, Scope, Service, ServiceFlags, ServiceKey},
    flow::tcp_flags,
    hash,
    net::Protocol,
    reason::DropReason,
};

use super::{Answer, affinity, flow, translate::NewFlow};
use crate::{
    family::IpFamily,
    maps::{self, Asks, Work},
    packet::Frame,
    skb,
};

/// A flow to a backend, if the packet is addressed to a service.
pub(crate) enum ToBackend {}

impl NewFlow for ToBackend {
    const KINDS: u32 = flow::kinds::SERVICE;

    #[inline(always)]
    fn open<F: IpFamily>(ctx: &impl Frame, work: &mut Work) -> Result<bool, DropReason> {
        open::<F>(ctx, work)
    }
}

#[inline(always)]
fn open<F: IpFamily>(ctx: &impl Frame, work: &mut Work) -> Result<bool, DropReason> {
    if !asked(work)? {
        let from = &work.from;
        let is_service = F::cluster_range().contains(&from.dst) && Protocol::has_ports(from.protocol);
        let is_service = is_service && maps::has_service(&ServiceKey::of_address(from.dst));
        return if is_service { Err(DropReason::NoPort) } else { Ok(false) };
    }
    // the host itself may have connected from what is a frontend's port
    if is_amid(work) && ctx.is_of_socket(&work.from) {
        return Ok(false);
    }
    let (from, service) = (&work.from, &work.service);
    if work.asks.of_another != 0 && service.flags & ServiceFlags::DSR == 0 {
        return Ok(false);
    }
    if service.flags & ServiceFlags::SOURCE_RANGES != 0 && !maps::is_source_allowed(service.id, &from.src) {
        return Err(DropReason::SourceRange);
    }
    let hash = if service.flags & ServiceFlags::HASH == 0 { skb::random() } else { hash::tuple(from) };
    let backend = select(service, &from.src, hash)?;
    work.reply.src = backend.addr;
    work.reply.src_port = backend.port;
    work.reply.dst = from.src;
    work.reply.dst_port = from.src_port;
    work.reply.protocol = from.protocol;
    let direct = is_direct(service, backend, work);
    let keeps_source = direct || !needs_source(service, backend, work);
    work.purpose.source = if keeps_source { Addr::UNSPECIFIED } else { node_source::<F>()? };
    work.purpose.service_id = service.id;
    work.purpose.backend_id = backend.id;
    work.purpose.backend_generation = backend.generation;
    work.purpose.flags = FlowFlags::SERVICE | if direct { FlowFlags::DIRECT } else { 0 };
    flow::create(work)?;
    Ok(true)
}

/// Whether the packet is a segment that does not ask for a connection.
#[inline(always)]
fn is_amid(work: &Work) -> bool {
    work.from.protocol == Protocol::TCP && !tcp_flags::opens(work.transport as u8)
}

/// Whether the backend's node is left to translate, and to answer: a client from outside asks, and the backend is on
/// another node, which is one of ours.
#[inline(always)]
fn is_direct(service: &Service, backend: &BackendSlot, work: &Work) -> bool {
    service.flags & ServiceFlags::DSR != 0
        && work.asks.from_outside != 0
        && maps::endpoint(&backend.addr).is_none()
        && maps::route(&backend.addr).is_some_and(Route::is_node)
}

/// Whether the backend is to see the node in place of the client, or its answer would not come back by here.
#[inline(always)]
fn needs_source(service: &Service, backend: &BackendSlot, work: &Work) -> bool {
    // a pod that is its own backend would see a packet from itself, which its stack refuses
    if backend.addr == work.from.src {
        return true;
    }
    // what is on this node answers by here, and sees who asks
    work.asks.from_outside != 0
        && service.flags & ServiceFlags::LOCAL == 0
        && maps::endpoint(&backend.addr).is_none()
}

#[inline(always)]
fn node_source<F: IpFamily>() -> Result<Addr, DropReason> {
    let addr = F::node_address();
    if addr.is_zero() { Err(DropReason::NoSourceAddress) } else { Ok(addr) }
}

/// Whether the packet is addressed to a service. Then `work.service` is its row.
#[inline(always)]
fn asked(work: &mut Work) -> Result<bool, DropReason> {
    let answer = Answer::from_number(maps::lend(work, || find_frontend()));
    // the only reason there is: the verifier would walk on with every number that might be one
    answer.get().map_err(|_broken| DropReason::BadService)
}

/// A function of its own to the verifier, which it walks once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_frontend() -> u32 {
    let Some(Work { from, asks, service, .. }) = maps::work() else {
        return DropReason::WriteFailed.number().into();
    };
    Answer::from(frontend(&from.dst, from.dst_port, from.protocol, *asks, service)).number()
}

/// Finds the service at an address and port, for who asks: whether there is one. Then `service` is its row.
#[inline(always)]
pub(crate) fn frontend(
    addr: &Addr,
    port: Port,
    protocol: u8,
    asks: Asks,
    service: &mut Service,
) -> Result<bool, DropReason> {
    if !Protocol::has_ports(protocol) {
        return Ok(false);
    }
    let mut key = ServiceKey { addr: *addr, port, protocol, scope: Scope::Any as u8 };
    let mut found = row(&key, service)?;
    if !found && asks.node_ports != 0 {
        key = key.at_node();
        found = row(&key, service)?;
    }
    if found && asks.from_outside != 0 && service.flags & ServiceFlags::OUTSIDE != 0 {
        key.scope = Scope::Outside as u8;
        // not there: it is about to be written, and the other still holds
        row(&key, service)?;
    }
    Ok(found)
}

/// Copies the row of a frontend, if there is one.
#[inline(always)]
fn row(key: &ServiceKey, service: &mut Service) -> Result<bool, DropReason> {
    #[inline(never)]
    fn outlined(key: &ServiceKey, service: &mut Service) -> Answer {
        sealed(key, service).into()
    }
    outlined(key, service).get()
}

#[inline(always)]
fn sealed(key: &ServiceKey, service: &mut Service) -> Result<bool, DropReason> {
    for _ in 0..TRIES {
        if !maps::copy_service(key, service) {
            return Ok(false);
        }
        if service.is_intact(key) {
            return Ok(true);
        }
    }
    Err(DropReason::BadService)
}

/// A row is looked up once more if it was another's by the time it was copied; a third time nobody is as slow.
const TRIES: u32 = 2;

/// A backend for a client: the one it had, if the service wants that, else the one `hash` falls on.
#[inline(always)]
pub(crate) fn select(
    service: &Service,
    client: &Addr,
    hash: u32,
) -> Result<&'static BackendSlot, DropReason> {
    if service.count == 0 {
        let local = service.flags & ServiceFlags::LOCAL != 0;
        return Err(if local { DropReason::NoLocalBackend } else { DropReason::NoBackend });
    }
    let slot = if service.affinity_timeout == 0 {
        service.first_slot + hash::scale(hash, service.count)
    } else if service.flags & ServiceFlags::HASH != 0 {
        // the same table and the same client are the same backend, on every node and without memory
        service.first_slot + hash::scale(hash::client(*client), service.count)
    } else {
        affinity::slot(service, client, hash)
    };
    maps::backend(slot).ok_or(DropReason::BadService)
}
