//! A packet leaves a pod: tc ingress of the pod's host-side device.
//!
//! Most packets go to another pod without translation: one lookup finds an address of this node,
//! two an address of another, and the packet is redirected past the host's stack. A flow is looked
//! up only for a packet that may be addressed to a frontend, or whose destination's row says that
//! replies to translated connections go there (`FlowHints`). A packet to outside of the cluster is
//! masqueraded and leaves by the kernel's route, or takes the stack (`stages::egress`).

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    net::EtherType,
    reason::{DropReason, HookId, Verdict},
};

use super::driver::Hook;
use crate::{
    frame::family::IpFamily,
    helpers::skb,
    scratch::Scratch,
    stages::{
        egress, nat, neighbour, next_hop, on_miss, ping,
        route::{self, DeliverVia, Destination, Origin},
        source,
    },
};

pub(crate) struct FromPod;

impl Hook for FromPod {
    type Context = TcContext;

    const ID: HookId = HookId::FromPod;

    #[inline(always)]
    fn check_frame(ctx: &TcContext) -> Result<Option<Verdict>, DropReason> {
        if skb::has_vlan_tag(ctx) { Err(DropReason::VlanTag) } else { Ok(None) }
    }

    #[inline(always)]
    fn run_not_ip(ctx: &TcContext, ether_type: u16) -> Result<Verdict, DropReason> {
        match ether_type {
            EtherType::ARP => neighbour::on_arp(ctx),
            tag if EtherType::is_vlan(tag) => Err(DropReason::VlanTag),
            _ => Ok(Verdict::StackNotIp),
        }
    }

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        if F::cluster_range().contains(&packet.dst)
            && let Some(verdict) = next_hop::forward::<F>(ctx, scratch)?
        {
            return Ok(verdict);
        }
        if let Some(verdict) = source::check_pod(ctx, &packet)? {
            return Ok(verdict);
        }
        let destination = route::lookup(&packet.dst)?;
        scratch.frontend_query = destination.frontend_query(Origin::Node);
        let may_have_flow = match destination {
            Destination::Outside { .. } => {
                if let Some(verdict) = packet.link_scoped(ctx) {
                    source::check_to_node::<F>(ctx)?;
                    return Ok(verdict);
                }
                true
            }
            Destination::ServiceRange => true,
            _ => destination.may_have_flow(ctx, &packet),
        };
        if may_have_flow
            && !scratch.next_hop.is_searched()
            && let Some(verdict) = next_hop::forward::<F>(ctx, scratch)?
        {
            return Ok(verdict);
        }
        if let Destination::Outside { .. } | Destination::ServiceRange = destination
            && let Some(verdict) = ping::answer(ctx, &packet, Self::ID)?
        {
            return Ok(verdict);
        }
        if destination.is_node(&packet.dst) {
            source::check_to_node::<F>(ctx)?;
        }
        egress::find::<F>(ctx, &destination, scratch);
        let translated = may_have_flow
            && match destination {
                // the only addresses that frontends have
                Destination::Outside { .. } | Destination::ServiceRange | Destination::Host(_) => {
                    nat::translate::<F, on_miss::SelectBackendOrMasquerade>(ctx, scratch)?
                }
                _ => nat::translate::<F, on_miss::Pass>(ctx, scratch)?,
            };
        if scratch.egress.ifindex != 0 && !(translated && scratch.nat.is_service()) {
            return egress::send::<F>(ctx, scratch);
        }
        if translated {
            next_hop::cache::<F>(ctx, scratch);
            let destination = route::lookup(&scratch.nat_tuple.dst)?;
            return route::forward_translated(ctx, &packet, &destination, scratch);
        }
        route::forward(ctx, &packet, &destination, DeliverVia::Peer)
    }
}
