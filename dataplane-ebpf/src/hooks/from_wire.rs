//! A packet arrives from another machine: tc ingress of an uplink.
//!
//! What is for a pod goes straight into it. Replies to what this node translated are restored first: once to undo a
//! masquerade (then the packet is for a pod), once more if the pod had asked a service.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    stages::{
        flow, icmp_error,
        parse::Packet,
        route::{self, Destination, Into},
    },
    verdict::Place,
};

pub(crate) struct FromWire;

impl Place for FromWire {
    const HOOK: Hook = Hook::FromWire;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        let mut packet = F::parse(ctx)?;
        let Some(destination) = arrive(ctx, &mut packet, work)? else { return Ok(Verdict::StackUnmanaged) };
        route::forward(ctx, &packet, &destination, Into::Peer)
    }
}

/// Where a packet from outside goes after every restoration; `None` if it is not for this node.
#[inline(always)]
pub(super) fn arrive<F: IpFamily>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    work: &mut Work,
) -> Result<Option<Destination>, DropReason> {
    let mut destination = route::find(&packet.dst)?;
    if !matches!(destination, Destination::Pod(_) | Destination::Host(_)) {
        return Ok(None);
    }
    // a masquerade, then a service; most packets leave at the first turn, their gate being closed
    for _ in 0..2 {
        let translated = if packet.is_icmp_error(ctx) {
            icmp_error::translate(ctx, packet, work)?
        } else {
            destination.gate_open(packet.protocol) && flow::translate(ctx, packet, work)?
        };
        if !translated {
            break;
        }
        destination = route::find(&packet.dst)?;
    }
    Ok(Some(destination))
}
