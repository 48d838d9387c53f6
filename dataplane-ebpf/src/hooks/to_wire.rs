//! A packet leaves the node by the kernel's routes: tc egress of an uplink.
//!
//! Pods that talk to the outside get the node's address here. Host processes that talk to a service, and were not
//! translated when they connected, get their backend here; what they answer to clients of another node bears the service's name
//! again.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    skb,
    stages::{
        masquerade::AsNode,
        parse::Packet,
        route::{self, Destination, From, Into},
        service::ToBackend,
        translate,
    },
    verdict::Place,
};

pub(crate) struct ToWire;

impl Place for ToWire {
    type Context = TcContext;

    const HOOK: Hook = Hook::ToWire;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        if skb::is_decided(ctx) {
            return Ok(Verdict::Forwarded);
        }
        let packet = F::parse(ctx)?;
        if let Some(verdict) = packet.link_scoped(ctx)
            && !F::is_routed(&packet.dst)
        {
            return Ok(verdict);
        }
        let destination = route::find(&packet.dst)?;
        work.asks = destination.asked(From::Here);
        let masquerade = match destination {
            Destination::Outside { masquerade } => masquerade,
            Destination::Services => false,
            Destination::Node(_) => return translate::answer(ctx, &packet, &destination, work),
            _ => return Ok(Verdict::Delivered),
        };
        match route::find(&packet.src)? {
            Destination::Pod(_) if masquerade => from_pod::<F>(ctx, work),
            Destination::Pod(_) => Ok(Verdict::Delivered),
            Destination::Host(_) => from_host::<F>(ctx, &packet, &destination, work),
            _ => Ok(Verdict::StackUnmanaged),
        }
    }
}

#[inline(always)]
fn from_pod<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
    let translated = translate::packet::<F, AsNode>(ctx, work)?;
    Ok(if translated { Verdict::Masqueraded } else { Verdict::Delivered })
}

#[inline(always)]
fn from_host<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    work: &mut Work,
) -> Result<Verdict, DropReason> {
    if !translate::packet::<F, ToBackend>(ctx, work)? {
        let nobodys = matches!(destination, Destination::Services);
        return if nobodys { Err(route::unserved(packet)) } else { Ok(Verdict::Delivered) };
    }
    match route::find(&work.to.dst)? {
        Destination::Outside { .. } => Ok(Verdict::Delivered),
        // back into the stack that sent it: it would refuse a packet from its own address
        Destination::Host(_) => Err(DropReason::HostLoop),
        destination => route::forward(ctx, packet, &destination, Into::Device),
    }
}
