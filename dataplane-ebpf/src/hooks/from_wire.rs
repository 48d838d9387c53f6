//! A packet arrives from another machine: tc ingress of an uplink.
//!
//! What is for a pod goes straight into it. What asks a service of this node (a node port, a host port, the address of a load
//! balancer) gets a backend, wherever it is; if that is on another node, this node stays in between, under its own address.
//! Replies to what this node translated are restored first: once to undo a masquerade (then the packet is for a pod),
//! once more if the pod had asked a service.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    stages::{
        parse::Packet,
        route::{self, Destination, From, Into},
        service::ToBackend,
        translate::{self, Known},
    },
    verdict::Place,
};

pub(crate) struct FromWire;

impl Place for FromWire {
    type Context = TcContext;

    const HOOK: Hook = Hook::FromWire;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        Ok(match arrive(ctx, &packet, work)? {
            Arrived::Here(destination) => route::forward(ctx, &packet, &destination, Into::Peer)?,
            Arrived::Translated(destination) => route::forward_translated(ctx, &packet, &destination, work)?,
            Arrived::Elsewhere => Verdict::StackUnmanaged,
        })
    }
}

/// What a packet from outside of the node is.
pub(super) enum Arrived {
    /// For a pod of this node, or the node itself.
    Here(Destination),
    /// Something else now than what arrived, for whoever it may be.
    Translated(Destination),
    /// For others.
    Elsewhere,
}

/// Where a packet from outside of the node goes after every translation.
#[inline(always)]
pub(super) fn arrive<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    work: &mut Work,
) -> Result<Arrived, DropReason> {
    let mut destination = route::find(&packet.dst)?;
    work.asks = destination.asked(From::Outside);
    let asks = match destination {
        Destination::Host(_) => destination.expects(ctx, packet),
        // cluster IPs, and addresses of load balancers
        Destination::Outside { .. } | Destination::Services => packet.link_scoped(ctx).is_none(),
        // another node was asked, and has left the answer to this one
        Destination::Node(_) => true,
        _ => false,
    };
    let mut translated = asks && translate::packet::<F, ToBackend>(ctx, work)?;
    if translated {
        destination = route::find(&work.to.dst)?;
    }
    if let Destination::Pod(_) = destination
        && destination.expects(ctx, packet)
        && translate::packet::<F, Known>(ctx, work)?
    {
        translated = true;
        destination = route::find(&work.to.dst)?;
    }
    Ok(match destination {
        _ if translated => Arrived::Translated(destination),
        Destination::Pod(_) | Destination::Host(_) => Arrived::Here(destination),
        Destination::Services if asks => return Err(route::unserved(packet)),
        _ => Arrived::Elsewhere,
    })
}
