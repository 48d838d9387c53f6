//! Services: which backend a packet or a socket gets.

use dataplane_common::{
    abi::{Addr, BackendSlot, FlowFlags, Port, Scope, Service, ServiceFlags, ServiceKey},
    hash,
    net::Protocol,
    reason::DropReason,
};

use super::{flow, translate::NewFlow};
use crate::{
    family::IpFamily,
    maps::{self, Work},
    skb,
};

/// A flow to a backend, if the packet is addressed to a service.
pub(crate) enum ToBackend {}

impl NewFlow for ToBackend {
    #[inline(always)]
    fn begins_here(flags: u32) -> bool {
        flags & FlowFlags::SERVICE != 0
    }

    #[inline(always)]
    fn open<F: IpFamily>(work: &mut Work) -> Result<bool, DropReason> {
        open::<F>(work)
    }
}

#[inline(always)]
fn open<F: IpFamily>(work: &mut Work) -> Result<bool, DropReason> {
    let from = &work.from;
    let Some(service) = frontend(&from.dst, from.dst_port, from.protocol) else { return Ok(false) };
    let random = if service.flags & ServiceFlags::HASH != 0 { hash::tuple(from) } else { skb::random() };
    let backend = select(service, random)?;
    work.reply.src = backend.addr;
    work.reply.src_port = backend.port;
    work.reply.dst = from.src;
    work.reply.dst_port = from.src_port;
    work.reply.protocol = from.protocol;
    // a pod that is its own backend would see a packet from itself, which its stack refuses
    work.purpose.source = if backend.addr == from.src { hairpin_source::<F>()? } else { Addr::UNSPECIFIED };
    work.purpose.service_id = service.id;
    work.purpose.backend_id = backend.id;
    work.purpose.backend_generation = backend.generation;
    work.purpose.flags = FlowFlags::SERVICE;
    flow::create(work)?;
    Ok(true)
}

#[inline(always)]
fn hairpin_source<F: IpFamily>() -> Result<Addr, DropReason> {
    let addr = F::node_address();
    if addr.is_unspecified() { Err(DropReason::NoSourceAddress) } else { Ok(addr) }
}

/// The service at an address and port.
#[inline(always)]
pub(crate) fn frontend(addr: &Addr, port: Port, protocol: u8) -> Option<&'static Service> {
    if protocol != Protocol::TCP && protocol != Protocol::UDP {
        return None;
    }
    maps::service(&ServiceKey { addr: *addr, port, protocol, scope: Scope::Any as u8 })
}

/// A backend of the service: the one `random` falls on.
#[inline(always)]
pub(crate) fn select(service: &Service, random: u32) -> Result<&'static BackendSlot, DropReason> {
    if service.count == 0 {
        return Err(DropReason::NoBackend);
    }
    maps::backend(service.first_slot + hash::scale(random, service.count)).ok_or(DropReason::BadService)
}
