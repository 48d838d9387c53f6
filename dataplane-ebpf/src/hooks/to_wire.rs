//! A packet leaves the node by the kernel's routes: tc egress of an uplink.
//!
//! Pods' packets to outside of the cluster that took the kernel's stack are masqueraded here (the
//! others at `from_pod`). Host processes' packets to a service get a backend, if they were not
//! translated at `connect()`; their replies to clients of other nodes are translated back to the
//! frontend.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, HookId, Verdict};

use super::driver::Hook;
use crate::{
    frame::{family::IpFamily, packet::Packet},
    helpers::skb,
    scratch::Scratch,
    stages::{
        nat, on_miss, ping,
        route::{self, DeliverVia, Destination, Origin},
    },
};

pub(crate) struct ToWire;

impl Hook for ToWire {
    type Context = TcContext;

    const ID: HookId = HookId::ToWire;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        if skb::is_handled(ctx) {
            return Ok(Verdict::Forwarded);
        }
        let packet = F::parse(ctx)?;
        if let Some(verdict) = packet.link_scoped(ctx)
            && !F::is_forwardable_link_local(&packet.dst)
        {
            return Ok(verdict);
        }
        let destination = route::lookup(&packet.dst)?;
        scratch.frontend_query = destination.frontend_query(Origin::Node);
        let masquerade = match destination {
            Destination::Outside { masquerade } => masquerade,
            Destination::ServiceRange => false,
            Destination::Node(_) => {
                return nat::translate_host_reply(ctx, &packet, &destination, scratch);
            }
            _ => return Ok(Verdict::Delivered),
        };
        match route::lookup(&packet.src)? {
            Destination::Pod(_) if masquerade => masquerade_pod::<F>(ctx, scratch),
            Destination::Pod(_) => Ok(Verdict::Delivered),
            Destination::Host(_) => translate_host::<F>(ctx, &packet, &destination, scratch),
            _ => Ok(Verdict::StackUnmanaged),
        }
    }
}

/// A pod's packet to outside of the cluster.
#[inline(always)]
fn masquerade_pod<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
    // an answer to a client outside (`FlowFlags::INBOUND`) is "translated" to itself
    let translated =
        nat::translate::<F, on_miss::Masquerade>(ctx, scratch)? && scratch.nat_tuple.src != scratch.tuple.src;
    Ok(if translated { Verdict::Masqueraded } else { Verdict::Delivered })
}

/// A host process's packet to outside of the cluster or to a service.
#[inline(always)]
fn translate_host<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    scratch: &mut Scratch,
) -> Result<Verdict, DropReason> {
    if let Some(verdict) = ping::answer(ctx, packet, ToWire::ID)? {
        return Ok(verdict);
    }
    if !nat::translate::<F, on_miss::SelectBackend>(ctx, scratch)? {
        let is_unserved = matches!(destination, Destination::ServiceRange);
        return if is_unserved { Err(route::no_service_reason(packet)) } else { Ok(Verdict::Delivered) };
    }
    let is_to_services = matches!(destination, Destination::ServiceRange);
    match route::lookup(&scratch.nat_tuple.dst)? {
        // the kernel's route to cluster IPs has a next hop that does not exist
        Destination::Outside { .. } if is_to_services => route::reroute(ctx, scratch),
        Destination::Outside { .. } => Ok(Verdict::Delivered),
        // the stack that sent it would drop a packet from its own address
        Destination::Host(_) => Err(DropReason::HostLoop),
        destination => route::forward(ctx, packet, &destination, DeliverVia::HostDevice),
    }
}
