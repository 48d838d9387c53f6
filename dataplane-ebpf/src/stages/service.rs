//! Services: which backend a packet or a socket gets.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    abi::{Addr, BackendSlot, FlowFlags, Port, Scope, Service, ServiceFlags, ServiceKey},
    hash,
    net::Protocol,
    reason::DropReason,
};

use super::{
    Answer, flow,
    parse::{self, Packet},
    rewrite,
};
use crate::{
    family::IpFamily,
    maps::{self, Work},
    skb,
};

/// Translates `packet` if it belongs to a flow, or opens one to a service: whether it did.
#[inline(always)]
pub(crate) fn translate<F: IpFamily>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    work: &mut Work,
) -> Result<bool, DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, packet: &mut Packet<F>, work: &mut Work) -> Answer {
        try_translate(ctx, packet, work).into()
    }
    outlined(ctx, packet, work).get()
}

#[inline(always)]
fn try_translate<F: IpFamily>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    work: &mut Work,
) -> Result<bool, DropReason> {
    parse::tuple(ctx, packet, work)?;
    if !flow::lookup(work, packet.tcp_flags(ctx)) && !open::<F>(work)? {
        return Ok(false);
    }
    rewrite::tuple(ctx, packet, work)?;
    Ok(true)
}

/// Makes a flow to a backend if `work.from` is addressed to a service: whether it is.
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
