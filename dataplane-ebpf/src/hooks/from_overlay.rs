//! A packet arrives from another node through the tunnel: tc ingress of the overlay device.
//!
//! As from the wire, but a packet for another machine is dropped.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    net::EtherType,
    reason::{DropReason, HookId, Verdict},
};

use super::{
    driver::Hook,
    from_wire::{Inbound, may_have_next_hop, resolve_inbound},
};
use crate::{
    frame::family::IpFamily,
    helpers::skb,
    scratch::Scratch,
    stages::{
        next_hop,
        route::{self, DeliverVia},
        source,
    },
};

pub(crate) struct FromOverlay;

impl Hook for FromOverlay {
    type Context = TcContext;

    const ID: HookId = HookId::FromOverlay;

    #[inline(always)]
    fn check_frame(ctx: &TcContext) -> Result<Option<Verdict>, DropReason> {
        if skb::has_vlan_tag(ctx) { Err(DropReason::VlanTag) } else { Ok(None) }
    }

    /// Nodes send IP only: the device has no neighbours.
    #[inline(always)]
    fn run_not_ip(_ctx: &TcContext, ether_type: u16) -> Result<Verdict, DropReason> {
        Err(if EtherType::is_vlan(ether_type) { DropReason::VlanTag } else { DropReason::TunnelSource })
    }

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        source::check_tunnel(ctx, &packet)?;
        let destination = route::lookup(&packet.dst)?;
        if may_have_next_hop(ctx, &packet, &destination)
            && let Some(verdict) = next_hop::forward::<F>(ctx, scratch)?
        {
            return Ok(verdict);
        }
        match resolve_inbound(ctx, &packet, destination, scratch, Self::ID)? {
            Inbound::Local(destination) => route::forward(ctx, &packet, &destination, DeliverVia::Peer),
            Inbound::Translated(destination) => {
                route::forward_translated(ctx, &packet, &destination, scratch)
            }
            Inbound::Done(verdict) => Ok(verdict),
            // the sending node's routes are out of date
            Inbound::NotLocal => Err(DropReason::NoEndpoint),
        }
    }
}
