//! A packet leaves the node by the kernel's routes: tc egress of an uplink.
//!
//! Pods that talk to the outside get the node's address here. Host processes that talk to a service, and were not
//! translated when they connected, get their backend here.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    skb,
    stages::{
        icmp_error, masquerade,
        parse::Packet,
        route::{self, Destination, Into},
        service,
    },
    verdict::Place,
};

pub(crate) struct ToWire;

impl Place for ToWire {
    const HOOK: Hook = Hook::ToWire;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        if skb::is_decided(ctx) {
            return Ok(Verdict::Forwarded);
        }
        let mut packet = F::parse(ctx)?;
        if let Some(verdict) = packet.link_scoped(ctx) {
            return Ok(verdict);
        }
        let Destination::Outside { masquerade } = route::find(&packet.dst)? else {
            return Ok(Verdict::Delivered);
        };
        match route::find(&packet.src)? {
            Destination::Pod(_) => from_pod(ctx, &mut packet, work, masquerade),
            Destination::Host(_) => from_host(ctx, &mut packet, work),
            _ => Ok(Verdict::StackUnmanaged),
        }
    }
}

#[inline(always)]
fn from_pod<F: IpFamily>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    work: &mut Work,
    masquerade: bool,
) -> Result<Verdict, DropReason> {
    if !masquerade {
        return Ok(Verdict::Delivered);
    }
    let translated = if packet.is_icmp_error(ctx) {
        icmp_error::translate(ctx, packet, work)?
    } else {
        masquerade::source(ctx, packet, work)?
    };
    Ok(if translated { Verdict::Masqueraded } else { Verdict::Delivered })
}

#[inline(always)]
fn from_host<F: IpFamily>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    work: &mut Work,
) -> Result<Verdict, DropReason> {
    if packet.protocol == F::ICMP || !service::translate(ctx, packet, work)? {
        return Ok(Verdict::Delivered);
    }
    match route::find(&packet.dst)? {
        Destination::Outside { .. } => Ok(Verdict::Delivered),
        // back into the stack that sent it: it would refuse a packet from its own address
        Destination::Host(_) => Err(DropReason::HostLoop),
        destination => route::forward(ctx, packet, &destination, Into::Device),
    }
}
