//! A packet arrives from another machine: tc ingress of an uplink.
//!
//! A packet to a pod is redirected into it. A packet to a frontend of this node (node port, host
//! port, load balancer address) gets a backend on any node; if that is another node, this node
//! stays in the path under its own address. Replies to translated connections are translated back:
//! once to undo masquerade, which may make the packet one for a pod of this node, and once more if
//! that pod had connected to a service.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    net::EtherType,
    reason::{DropReason, HookId, Verdict},
};

use super::driver::Hook;
use crate::{
    frame::{family::IpFamily, packet::Packet},
    helpers::skb::{self, AddressedTo},
    scratch::Scratch,
    stages::{
        egress, nat, next_hop, on_miss, ping,
        route::{self, DeliverVia, Destination, Origin},
        source,
    },
};

pub(crate) struct FromWire;

impl Hook for FromWire {
    type Context = TcContext;

    const ID: HookId = HookId::FromWire;

    #[inline(always)]
    fn check_frame(ctx: &TcContext) -> Result<Option<Verdict>, DropReason> {
        if skb::has_vlan_tag(ctx) {
            return Ok(Some(Verdict::StackVlan));
        }
        Ok(match skb::addressed_to(ctx) {
            AddressedTo::Host => None,
            AddressedTo::Group => Some(Verdict::StackLinkLocal),
            AddressedTo::Other => Some(Verdict::StackOtherHost),
        })
    }

    #[inline(always)]
    fn run_not_ip(_ctx: &TcContext, ether_type: u16) -> Result<Verdict, DropReason> {
        Ok(if EtherType::is_vlan(ether_type) { Verdict::StackVlan } else { Verdict::StackNotIp })
    }

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        // node ports, and answers to what was masqueraded
        if packet.dst == F::node_address()
            && let Some(verdict) = next_hop::forward::<F>(ctx, scratch)?
        {
            return Ok(verdict);
        }
        let destination = route::lookup(&packet.dst)?;
        if !scratch.next_hop.is_searched()
            && may_have_next_hop(ctx, &packet, &destination)
            && let Some(verdict) = next_hop::forward::<F>(ctx, scratch)?
        {
            return Ok(verdict);
        }
        if let Some(verdict) = source::check_wire(ctx, &packet)? {
            return Ok(verdict);
        }
        Ok(match resolve_inbound(ctx, &packet, destination, scratch, Self::ID)? {
            Inbound::Local(destination) => {
                if let Destination::Pod(_) = destination {
                    nat::remember_inbound(ctx, &packet, scratch);
                    if egress::stack_delivers(&packet)? {
                        return Ok(Verdict::StackPod);
                    }
                }
                route::forward(ctx, &packet, &destination, DeliverVia::Peer)?
            }
            Inbound::Translated(destination) => {
                route::forward_translated(ctx, &packet, &destination, scratch)?
            }
            Inbound::Done(verdict) => verdict,
            Inbound::NotLocal => Verdict::StackUnmanaged,
        })
    }
}

/// Where a packet from outside of the node goes.
pub(super) enum Inbound {
    /// To a pod of this node or to the node itself, unchanged.
    Local(Destination),
    /// To `scratch.nat_tuple`, on this node or elsewhere.
    Translated(Destination),
    /// The run ends: this node has answered, or the kernel's stack delivers the packet.
    Done(Verdict),
    /// Past this node: nothing of it is this datapath's.
    NotLocal,
}

/// Whether a packet to `destination` may be one of a flow with a cached next hop.
#[inline(always)]
pub(super) fn may_have_next_hop<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
) -> bool {
    match destination {
        Destination::Pod(_) | Destination::Host(_) => destination.may_have_flow(ctx, packet),
        _ => true,
    }
}

/// Translates a packet from outside of the node as often as needed, and finds its destination;
/// `destination` is that of the packet as it arrived.
///
/// The first pass translates packets to frontends, and replies to both translated service
/// connections and masqueraded ones; on a miss it may select a backend. The second pass translates
/// replies whose masquerade the first has undone.
#[inline(always)]
pub(super) fn resolve_inbound<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    mut destination: Destination,
    scratch: &mut Scratch,
    hook: HookId,
) -> Result<Inbound, DropReason> {
    scratch.frontend_query = destination.frontend_query(Origin::Outside);
    let may_be_to_frontend = match destination {
        Destination::Host(_) => destination.may_have_flow(ctx, packet),
        // cluster IPs, and addresses of load balancers
        Destination::Outside { .. } | Destination::ServiceRange => packet.link_scoped(ctx).is_none(),
        // another node's node port: that node may have sent the packet on unchanged (direct server
        // return)
        Destination::Node(_) => true,
        _ => false,
    };
    let mut translated = may_be_to_frontend && nat::translate::<F, on_miss::SelectBackend>(ctx, scratch)?;
    if translated {
        // to_pod translates it again, if the pod had connected to a service
        if scratch.nat.takes_stack() {
            return Ok(Inbound::Done(Verdict::StackPod));
        }
        destination = route::lookup(&scratch.nat_tuple.dst)?;
    }
    if let Destination::Pod(_) = destination
        && destination.may_have_flow(ctx, packet)
        && nat::translate::<F, on_miss::Pass>(ctx, scratch)?
    {
        if scratch.nat.is_inbound() && egress::stack_delivers(packet)? {
            return Ok(Inbound::Done(Verdict::StackPod));
        }
        translated = true;
        destination = route::lookup(&scratch.nat_tuple.dst)?;
    }
    if translated {
        next_hop::cache::<F>(ctx, scratch);
    }
    Ok(match destination {
        _ if translated => Inbound::Translated(destination),
        Destination::Pod(_) | Destination::Host(_) => Inbound::Local(destination),
        Destination::Outside { .. } | Destination::ServiceRange if may_be_to_frontend => {
            match ping::answer(ctx, packet, hook)? {
                Some(verdict) => Inbound::Done(verdict),
                None if matches!(destination, Destination::ServiceRange) => {
                    return Err(route::no_service_reason(packet));
                }
                None => Inbound::NotLocal,
            }
        }
        _ => Inbound::NotLocal,
    })
}
