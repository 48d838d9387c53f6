//! Where an address is, and how a packet gets there.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, programs::TcContext};
use dataplane_common::{
    abi::{Addr, Endpoint, MacAddr, Route, RouteKind},
    net::{EthHeader, Protocol},
    reason::{DropReason, Verdict},
};

use super::{Answer, parse::Packet};
use crate::{
    config,
    family::{IpFamily, L3},
    maps::{self, Asks, Work},
    packet::{self, Frame},
    skb::{self, Way},
};

/// Where an address is.
pub(crate) enum Destination {
    /// A pod of this node.
    Pod(&'static Endpoint),
    /// This node itself.
    Host(&'static Endpoint),
    /// Another node, or a pod of it.
    Node(&'static Route),
    /// Outside of the cluster, or a service.
    Outside { masquerade: bool },
    /// Where cluster IPs come from: a service, or nobody.
    Services,
    /// In this node's pod CIDR, but nobody's.
    Nobody,
}

impl Destination {
    /// Whether `packet` to it may belong to a flow: its gate is open, or it is about another packet.
    #[inline(always)]
    pub(crate) fn expects<F: IpFamily>(&self, ctx: &impl Frame, packet: &Packet<F>) -> bool {
        match self {
            Self::Pod(endpoint) | Self::Host(endpoint) => {
                endpoint.flow_hints.may_have_flow(packet.protocol) || packet.is_icmp_error(ctx)
            }
            Self::Node(route) => route.flow_hints.may_have_flow(packet.protocol) || packet.is_icmp_error(ctx),
            Self::Outside { .. } | Self::Services | Self::Nobody => false,
        }
    }

    /// How a packet to it asks, if it asks a frontend.
    #[inline(always)]
    pub(crate) fn asked(&self, from: From) -> Asks {
        // another node leaves to us what asks a port of its own, if its backend is here
        let of_another = from == From::Outside && matches!(self, Self::Node(_));
        let node_ports = of_another || matches!(self, Self::Host(endpoint) if endpoint.has_node_ports());
        Asks {
            from_outside: u32::from(from == From::Outside),
            node_ports: u32::from(node_ports),
            of_another: u32::from(of_another),
        }
    }
}

/// Where a packet comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// A pod, or a process of the host.
    Here,
    /// Another machine.
    Outside,
}

/// Finds an address: one lookup for what is on this node, two for the rest.
#[inline(always)]
pub(crate) fn find(addr: &Addr) -> Result<Destination, DropReason> {
    if let Some(endpoint) = maps::endpoint(addr) {
        return Ok(if endpoint.is_host() { Destination::Host(endpoint) } else { Destination::Pod(endpoint) });
    }
    let Some(route) = maps::route(addr) else { return Ok(Destination::Outside { masquerade: true }) };
    match route.kind() {
        Some(RouteKind::Native | RouteKind::Overlay) => Ok(Destination::Node(route)),
        Some(RouteKind::NoMasquerade) => Ok(Destination::Outside { masquerade: false }),
        Some(RouteKind::Local) => Ok(Destination::Nobody),
        Some(RouteKind::Services) => Ok(Destination::Services),
        None => Err(DropReason::BadRoute),
    }
}

/// How a packet enters a pod's device, which depends on where our program stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// From a device's ingress: straight to the other end of the pair (kernel 5.10).
    Peer,
    /// From a device's egress: through the host-side end.
    Device,
}

/// Sends a packet where its destination is.
#[inline(always)]
pub(crate) fn forward<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    into: Into,
) -> Result<Verdict, DropReason> {
    // at a device's egress nobody is left who could say that a packet is too big: there the tunnel's own packet is sent in
    // fragments
    forward_or_answer(ctx, packet, destination, into, into == Into::Peer)
}

/// `answerable`: whether the stack says it where a packet is too big.
#[inline(always)]
fn forward_or_answer<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    into: Into,
    answerable: bool,
) -> Result<Verdict, DropReason> {
    match destination {
        Destination::Pod(endpoint) => deliver(ctx, packet, endpoint, into),
        Destination::Host(_) => Ok(Verdict::StackHost),
        Destination::Node(route) => to_node(ctx, packet, route, into, answerable),
        Destination::Outside { .. } => Ok(Verdict::StackOutside),
        Destination::Services => Err(unserved(packet)),
        Destination::Nobody => Err(DropReason::NoEndpoint),
    }
}

/// Why a packet to where cluster IPs come from goes nowhere.
#[inline(always)]
pub(crate) const fn unserved<F: IpFamily>(packet: &Packet<F>) -> DropReason {
    if Protocol::has_ports(packet.protocol) { DropReason::NoService } else { DropReason::ServiceProtocol }
}

/// Sends a packet of tuple `work.to`, which is not the one it came with, from a device's ingress where its destination is.
#[inline(always)]
pub(crate) fn forward_translated<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    work: &Work,
) -> Result<Verdict, DropReason> {
    match destination {
        // to a backend outside of the cluster, under the pod's own address: what leaves the node will be masqueraded
        Destination::Outside { .. } if work.to.src == packet.src => Ok(Verdict::StackOutside),
        Destination::Outside { .. } => to_outside(ctx, packet, work),
        // what is too big and comes this far may be sent in fragments
        _ => forward_or_answer(ctx, packet, destination, Into::Peer, work.is_ours == 0),
    }
}

/// Whether a packet of tuple `work.to`, which had `work.from`, is too big for its way, and nobody but us could say so: then
/// `work.mtu` is what it takes. Leaves in `work.is_ours` whether the stack would not forward it.
#[inline(always)]
pub(crate) fn is_too_big<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<bool, DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Answer {
        Ok(measure::<F>(ctx, work)).into()
    }
    outlined::<F>(ctx, work).get()
}

#[inline(always)]
fn measure<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> bool {
    let is_ours = work.direct != 0 || work.to.src != work.from.src;
    work.is_ours = u32::from(is_ours);
    let length = ctx.length().saturating_sub(L3 as u32);
    // IPv6 promises this much anywhere (RFC 8200 §5), and nobody makes less of IPv4
    if !is_ours || length <= 1_280 || ctx.is_gso() || F::may_be_fragmented(ctx) {
        return false;
    }
    let Some(route) = maps::route(&work.to.dst) else { return false };
    work.mtu = route.mtu;
    route.is_node() && route.mtu != 0 && length > route.mtu
}

/// Past the stack, which would refuse a packet that comes from outside with the node's own address as its source.
#[inline(always)]
fn to_outside<F: IpFamily>(ctx: &TcContext, packet: &Packet<F>, work: &Work) -> Result<Verdict, DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, work: &Work) -> Answer {
        by_kernels_routes::<F>(ctx, work).into()
    }
    if packet.hop_limit <= 1 {
        return Ok(Verdict::StackTtlExpired);
    }
    let gone = outlined::<F>(ctx, work).get()?;
    Ok(if gone { Verdict::ToOutside } else { Verdict::StackOutside })
}

/// Whether the kernel has a route.
#[inline(always)]
fn by_kernels_routes<F: IpFamily>(ctx: &TcContext, work: &Work) -> Result<bool, DropReason> {
    let way = skb::way(ctx, &work.to.src, &work.to.dst, 0);
    if let Way::None = way {
        return Ok(false);
    }
    F::decrement_hop_limit(ctx)?;
    skb::mark_decided(ctx);
    let action = match way {
        Way::Neighbour { ifindex, ours, theirs } => {
            set_link_addresses(ctx, theirs, ours)?;
            skb::redirect(ifindex)
        }
        Way::Unresolved { ifindex, next_hop } => skb::redirect_neigh(ifindex, &next_hop),
        Way::None => return Ok(false),
    };
    redirected(action, Verdict::ToOutside).map(|_| true)
}

#[inline(always)]
fn deliver<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    endpoint: &Endpoint,
    into: Into,
) -> Result<Verdict, DropReason> {
    if packet.hop_limit <= 1 {
        return Ok(Verdict::StackTtlExpired);
    }
    F::decrement_hop_limit(ctx)?;
    set_link_addresses(ctx, endpoint.mac, config::host_mac())?;
    // the short way passes the device's queue by
    let action = if into == Into::Peer && !endpoint.is_shaped() {
        // the flag "for another host" would survive into the pod, whose stack would drop the packet
        skb::address_to_host(ctx)?;
        skb::redirect_peer(endpoint.ifindex)
    } else {
        skb::mark_decided(ctx);
        skb::redirect(endpoint.ifindex)
    };
    redirected(action, Verdict::ToPod)
}

#[inline(always)]
fn to_node<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    route: &Route,
    into: Into,
    answerable: bool,
) -> Result<Verdict, DropReason> {
    if packet.hop_limit <= 1 {
        return Ok(Verdict::StackTtlExpired);
    }
    if answerable && route.mtu != 0 && ctx.length() > route.mtu + L3 as u32 && !ctx.is_gso() {
        return Ok(Verdict::StackTooBig);
    }
    F::decrement_hop_limit(ctx)?;
    skb::mark_decided(ctx);
    if route.kind() == Some(RouteKind::Overlay) {
        enter_tunnel(ctx, route)?;
        redirected(skb::redirect(route.ifindex), Verdict::ToOverlay)
    } else if into == Into::Device {
        redirected(skb::redirect_neigh_by_route(route.ifindex), Verdict::ToWire)
    } else {
        redirected(skb::redirect_neigh(route.ifindex, &route.next_hop), Verdict::ToWire)
    }
}

/// Addresses the frame to the overlay device of the other node, and tells ours where that node is.
///
/// All overlay devices have the same link address, and a VXLAN device drops what claims to come from its own
/// (`drivers/net/vxlan/vxlan_core.c`, `vxlan_set_mac`): the source is another one.
#[inline(always)]
pub(crate) fn enter_tunnel(ctx: &TcContext, route: &Route) -> Result<(), DropReason> {
    // the tunnel key has no place on the stack of a hook that calls as deep as `from_pod`
    #[inline(never)]
    fn outlined(ctx: &TcContext, route: &Route) -> Answer {
        let addressed = set_link_addresses(ctx, config::overlay_mac(), config::host_mac());
        addressed
            .and_then(|()| skb::set_tunnel(ctx, config::overlay_vni(), &route.next_hop))
            .map(|()| true)
            .into()
    }
    outlined(ctx, route).get().map(|_| ())
}

#[inline(always)]
pub(crate) fn set_link_addresses(ctx: &impl Frame, dst: MacAddr, src: MacAddr) -> Result<(), DropReason> {
    packet::with_header(ctx, 0, |eth: &mut EthHeader| eth.set_addresses(dst, src))
}

/// A redirect helper's answer: anything but "redirect" means that it refused its arguments.
#[inline(always)]
fn redirected(action: i32, verdict: Verdict) -> Result<Verdict, DropReason> {
    if action == TC_ACT_REDIRECT { Ok(verdict) } else { Err(DropReason::BadRoute) }
}
