//! A packet arrives from another machine: tc ingress of an uplink.
//!
//! What is for a pod goes straight into it. What is for a port of this node that belongs to a pod gets the pod's address.
//! Replies to what this node translated are restored first: once to undo a masquerade (then the packet is for a pod),
//! once more if the pod had asked a service.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    stages::{
        parse::Packet,
        route::{self, Destination, Into},
        service::ToBackend,
        translate::{self, Known},
    },
    verdict::Place,
};

pub(crate) struct FromWire;

impl Place for FromWire {
    const HOOK: Hook = Hook::FromWire;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        let Some(destination) = arrive(ctx, &packet, work)? else { return Ok(Verdict::StackUnmanaged) };
        route::forward(ctx, &packet, &destination, Into::Peer)
    }
}

/// Where a packet from outside goes after every translation; `None` if it is not for this node.
#[inline(always)]
pub(super) fn arrive<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    work: &mut Work,
) -> Result<Option<Destination>, DropReason> {
    let mut destination = route::find(&packet.dst)?;
    if let Destination::Host(_) = destination
        && destination.expects(ctx, packet)
        && translate::packet::<F, ToBackend>(ctx, work)?
    {
        destination = route::find(&work.to.dst)?;
    }
    if let Destination::Pod(_) = destination
        && destination.expects(ctx, packet)
        && translate::packet::<F, Known>(ctx, work)?
    {
        destination = route::find(&work.to.dst)?;
    }
    Ok(match destination {
        Destination::Pod(_) | Destination::Host(_) => Some(destination),
        _ => None,
    })
}
