//! Routing: finds the destination of an address, and forwards packets there.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, programs::TcContext};
use dataplane_common::{
    abi::{Addr, Endpoint, MacAddr, Route, RouteKind},
    net::{EthHeader, Protocol, UdpHeader},
    reason::{DropReason, Verdict},
};

use crate::{
    config,
    frame::{
        Frame, L3,
        family::IpFamily,
        packet::{Fragment, Packet},
        with_header,
    },
    global::{self, PackedResult, global_functions},
    helpers::{
        fib::{self, ANY_LENGTH, NextHop},
        keep_branch, skb,
    },
    maps,
    scratch::{FrontendQuery, Scratch},
};

/// What an address belongs to.
pub(crate) enum Destination {
    /// A pod of this node.
    Pod(&'static Endpoint),
    /// This node itself.
    Host(&'static Endpoint),
    /// Another node, or a pod of it.
    Node(&'static Route),
    /// Outside of the cluster, or a service's address outside of the service range.
    Outside { masquerade: bool },
    /// The range of cluster IPs (`ServiceCIDR`).
    ServiceRange,
    /// This node's pod CIDR, but no pod has the address.
    Unassigned,
}

impl Destination {
    /// Whether `packet` to it may belong to a flow: `FlowHints` say so, and for the host the port
    /// does, or it is an ICMP error, which may quote a packet of one.
    #[inline(always)]
    pub(crate) fn may_have_flow<F: IpFamily>(&self, ctx: &impl Frame, packet: &Packet<F>) -> bool {
        match self {
            Self::Pod(endpoint) => {
                endpoint.flow_hints.may_have_flow(packet.protocol) || packet.is_icmp_error(ctx)
            }
            Self::Host(endpoint) => {
                (endpoint.flow_hints.may_have_flow(packet.protocol) && is_port_translated(ctx, packet))
                    || packet.is_icmp_error(ctx)
            }
            Self::Node(route) => route.flow_hints.may_have_flow(packet.protocol) || packet.is_icmp_error(ctx),
            Self::Outside { .. } | Self::ServiceRange | Self::Unassigned => false,
        }
    }

    /// Whether it is a node, this or another, not a pod of it. `dst`: the address it was found for.
    #[inline(always)]
    pub(crate) fn is_node(&self, dst: &Addr) -> bool {
        match self {
            Self::Host(_) => true,
            Self::Node(route) => route.next_hop == *dst,
            _ => false,
        }
    }

    /// How to look for the frontend of a packet to it.
    #[inline(always)]
    pub(crate) fn frontend_query(&self, origin: Origin) -> FrontendQuery {
        // direct server return: another node sends on packets to its node ports, if the backend is
        // here
        let addr_of_other_node = origin == Origin::Outside && matches!(self, Self::Node(_));
        let match_node_ports =
            addr_of_other_node || matches!(self, Self::Host(endpoint) if endpoint.has_node_ports());
        FrontendQuery {
            from_outside: u32::from(origin == Origin::Outside),
            match_node_ports: u32::from(match_node_ports),
            addr_of_other_node: u32::from(addr_of_other_node),
        }
    }
}

/// Whether a packet to the host has a port that may be translated. True if its port is not here.
#[inline(always)]
pub(crate) fn is_port_translated<F: IpFamily>(ctx: &impl Frame, packet: &Packet<F>) -> bool {
    if packet.fragment != Fragment::Whole || !Protocol::has_ports(packet.protocol) {
        return true;
    }
    ctx.read::<UdpHeader>(packet.l4)
        .map_or(true, |ports| maps::is_port_translated(packet.protocol, ports.dst_port()))
}

/// Where a packet comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A pod or a process of this node.
    Node,
    /// Another machine.
    Outside,
}

/// Finds the destination of an address: one lookup for an address of this node, two for others.
#[inline(always)]
pub(crate) fn lookup(addr: &Addr) -> Result<Destination, DropReason> {
    if let Some(endpoint) = maps::endpoint(addr) {
        if endpoint.is_host() {
            keep_branch();
            return Ok(Destination::Host(endpoint));
        }
        return Ok(Destination::Pod(endpoint));
    }
    let Some(route) = maps::route(addr) else { return Ok(Destination::Outside { masquerade: true }) };
    match route.kind() {
        Some(RouteKind::Native | RouteKind::Overlay) => Ok(Destination::Node(route)),
        Some(RouteKind::NoMasquerade) => Ok(Destination::Outside { masquerade: false }),
        Some(RouteKind::Local) => Ok(Destination::Unassigned),
        Some(RouteKind::Services) => Ok(Destination::ServiceRange),
        None => Err(DropReason::BadRoute),
    }
}

/// How a packet enters a pod, which depends on where the program is attached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeliverVia {
    /// From tc ingress: straight to the pod's end of the veth pair (`bpf_redirect_peer`,
    /// Linux 5.10).
    Peer,
    /// From tc egress: through the host-side device.
    HostDevice,
}

/// Forwards a packet to its destination, untranslated or by a hook at egress.
#[inline(always)]
pub(crate) fn forward<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    via: DeliverVia,
) -> Result<Verdict, DropReason> {
    // at egress the stack can no longer answer "packet too big"; the outer packet of the tunnel is
    // fragmented instead
    forward_with_mtu_check(ctx, packet, destination, via, via == DeliverVia::Peer)
}

/// `check_mtu`: give a packet larger than its route's MTU to the stack, which answers "packet too
/// big".
#[inline(always)]
fn forward_with_mtu_check<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    via: DeliverVia,
    check_mtu: bool,
) -> Result<Verdict, DropReason> {
    match destination {
        Destination::Pod(endpoint) => deliver(ctx, packet, endpoint, via),
        Destination::Host(_) => Ok(Verdict::StackHost),
        Destination::Node(route) => to_node(ctx, packet, route, via, check_mtu),
        Destination::Outside { .. } => Ok(Verdict::StackOutside),
        Destination::ServiceRange => Err(no_service_reason(packet)),
        Destination::Unassigned => Err(DropReason::NoEndpoint),
    }
}

/// Why a packet to the service range is dropped if no frontend matches.
#[inline(always)]
pub(crate) const fn no_service_reason<F: IpFamily>(packet: &Packet<F>) -> DropReason {
    if Protocol::has_ports(packet.protocol) { DropReason::NoService } else { DropReason::ServiceProtocol }
}

/// Forwards a translated packet, whose tuple is `scratch.nat_tuple`, from tc ingress.
#[inline(always)]
pub(crate) fn forward_translated<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    scratch: &mut Scratch,
) -> Result<Verdict, DropReason> {
    match destination {
        // a pod's packet to a backend outside of the cluster: to_wire masquerades it
        Destination::Outside { .. } if scratch.nat_tuple.src == packet.src => Ok(Verdict::StackOutside),
        Destination::Outside { .. } => forward_outside(ctx, packet, scratch),
        // what check_limits let pass may be fragmented
        _ => forward_with_mtu_check(
            ctx,
            packet,
            destination,
            DeliverVia::Peer,
            scratch.nat.bypasses_stack == 0,
        ),
    }
}

/// Checks hop limit and size of a packet that is about to be translated to `scratch.nat_tuple`,
/// where the stack could not answer for it: it would not know the packet that was sent. Sets
/// `scratch.nat.bypasses_stack`.
///
/// # Errors
/// [`DropReason::TtlExpired`]; [`DropReason::TooBig`], with the MTU in `scratch.nat.path_mtu`.
#[inline(always)]
pub(crate) fn check_limits<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<(), DropReason> {
    global::call(scratch, || call_check_limits::<F>(ctx)).unpack().map(|_| ())
}

global_functions! {
    call_check_limits: check_limits_v4, check_limits_v6 = run(try_check_limits);
    call_forward_by_fib: forward_by_fib_v4, forward_by_fib_v6 = run(forward_by_fib);
}

#[inline(always)]
fn try_check_limits<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<(), DropReason> {
    if is_expired(scratch) {
        Err(DropReason::TtlExpired)
    } else if exceeds_path_mtu::<F>(ctx, scratch) {
        Err(DropReason::TooBig)
    } else {
        Ok(())
    }
}

/// Whether a packet from another machine would be forwarded with a hop limit of 0.
#[inline(always)]
fn is_expired(scratch: &Scratch) -> bool {
    scratch.nat.hop_limit <= 1
        && scratch.frontend_query.from_outside != 0
        && !maps::endpoint(&scratch.nat_tuple.dst).is_some_and(Endpoint::is_host)
}

#[inline(always)]
fn exceeds_path_mtu<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> bool {
    let bypasses_stack = scratch.nat.is_direct() || scratch.nat_tuple.src != scratch.tuple.src;
    scratch.nat.bypasses_stack = u32::from(bypasses_stack);
    let length = ctx.length().saturating_sub(L3 as u32);
    // the minimum MTU of IPv6 (RFC 8200 §5); no IPv4 link of a cluster has less
    if !bypasses_stack || length <= 1_280 || ctx.is_gso() || F::may_be_fragmented(ctx) {
        return false;
    }
    let Some(route) = maps::route(&scratch.nat_tuple.dst) else { return false };
    scratch.nat.path_mtu = route.mtu;
    route.is_node() && route.mtu != 0 && length > route.mtu
}

/// Forwards a packet that leaves the cluster past the stack, which drops a packet that arrives with
/// the node's own address as its source.
#[inline(always)]
fn forward_outside<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    scratch: &mut Scratch,
) -> Result<Verdict, DropReason> {
    if packet.hop_limit <= 1 {
        return Ok(Verdict::StackTtlExpired);
    }
    let forwarded = global::call(scratch, || call_forward_by_fib::<F>(ctx)).unpack()?;
    Ok(if forwarded { Verdict::ToOutside } else { Verdict::StackOutside })
}

/// Sends a translated packet of the host on by the kernel's route to its new destination: the stack
/// routed it to the old one.
#[inline(always)]
pub(crate) fn reroute(ctx: &TcContext, scratch: &Scratch) -> Result<Verdict, DropReason> {
    #[inline(never)]
    fn outlined(ctx: &TcContext, scratch: &Scratch) -> u32 {
        match fib::fib_lookup(ctx, &scratch.nat_tuple.src, &scratch.nat_tuple.dst, ANY_LENGTH) {
            NextHop::Resolved { ifindex, .. } | NextHop::Unresolved { ifindex, .. } => ifindex,
            NextHop::None => 0,
        }
    }
    let ifindex = outlined(ctx, scratch);
    if ifindex == 0 {
        return Ok(Verdict::Delivered);
    }
    skb::mark_handled(ctx);
    redirect_result(skb::redirect_neigh_by_route(ifindex), Verdict::ToOutside)
}

/// Forwards by the kernel's routing tables. False if they have no usable route.
#[inline(always)]
fn forward_by_fib<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<bool, DropReason> {
    match fib::fib_lookup(ctx, &scratch.nat_tuple.src, &scratch.nat_tuple.dst, ANY_LENGTH) {
        NextHop::Resolved { ifindex, next_hop, .. } | NextHop::Unresolved { ifindex, next_hop } => {
            leave::<F>(ctx, ifindex, &next_hop).map(|_| true)
        }
        NextHop::None => Ok(false),
    }
}

/// Sends a packet to a router or machine outside of the cluster, by the kernel's neighbour entry,
/// which is refreshed by being used. The hop limit must be above 1.
#[inline(always)]
pub(super) fn leave<F: IpFamily>(
    ctx: &TcContext,
    ifindex: u32,
    next_hop: &Addr,
) -> Result<Verdict, DropReason> {
    F::decrement_hop_limit(ctx)?;
    skb::mark_handled(ctx);
    redirect_result(skb::redirect_neigh(ifindex, next_hop), Verdict::ToOutside)
}

#[inline(always)]
fn deliver<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    endpoint: &Endpoint,
    via: DeliverVia,
) -> Result<Verdict, DropReason> {
    if endpoint.is_down() {
        return Err(DropReason::DeviceDown);
    }
    if !pass_hop::<F>(ctx, packet, via)? {
        return Ok(Verdict::StackTtlExpired);
    }
    set_link_addresses(ctx, endpoint.mac, config::host_mac())?;
    // bpf_redirect_peer bypasses the queue that limits a pod's bandwidth
    let action = if via == DeliverVia::Peer && !endpoint.is_shaped() {
        // the pod's stack drops a packet whose pkt_type still says PACKET_OTHERHOST
        skb::set_packet_host(ctx)?;
        skb::redirect_peer(endpoint.ifindex)
    } else {
        skb::mark_handled(ctx);
        skb::redirect(endpoint.ifindex)
    };
    redirect_result(action, Verdict::ToPod)
}

/// Decrements the hop limit as a router does. False if it has expired. A packet of the host itself,
/// which leaves at tc egress, has not passed a router yet.
#[inline(always)]
fn pass_hop<F: IpFamily>(ctx: &TcContext, packet: &Packet<F>, via: DeliverVia) -> Result<bool, DropReason> {
    if via == DeliverVia::HostDevice {
        return Ok(true);
    }
    if packet.hop_limit <= 1 {
        return Ok(false);
    }
    F::decrement_hop_limit(ctx).map(|()| true)
}

#[inline(always)]
fn to_node<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    route: &Route,
    via: DeliverVia,
    check_mtu: bool,
) -> Result<Verdict, DropReason> {
    if via == DeliverVia::Peer && packet.hop_limit <= 1 {
        return Ok(Verdict::StackTtlExpired);
    }
    if check_mtu && route.mtu != 0 && ctx.length() > route.mtu + L3 as u32 && !ctx.is_gso() {
        return Ok(Verdict::StackTooBig);
    }
    pass_hop::<F>(ctx, packet, via)?;
    skb::mark_handled(ctx);
    if route.kind() == Some(RouteKind::Overlay) {
        encapsulate(ctx, route)?;
        redirect_result(skb::redirect(route.ifindex), Verdict::ToOverlay)
    } else if via == DeliverVia::HostDevice {
        redirect_result(skb::redirect_neigh_by_route(route.ifindex), Verdict::ToWire)
    } else {
        redirect_result(skb::redirect_neigh(route.ifindex, &route.next_hop), Verdict::ToWire)
    }
}

/// Prepares a packet for the VXLAN device: inner link addresses, and the tunnel key with the other
/// node's address.
///
/// All overlay devices have the same link address, and a VXLAN device drops frames whose source is
/// its own (`drivers/net/vxlan/vxlan_core.c`, `vxlan_set_mac`), so the source is the host's.
#[inline(always)]
pub(crate) fn encapsulate(ctx: &TcContext, route: &Route) -> Result<(), DropReason> {
    // the tunnel key does not fit on the BPF stack beside the call chain of `from_pod`
    #[inline(never)]
    fn outlined(ctx: &TcContext, route: &Route) -> PackedResult {
        let result = set_link_addresses(ctx, config::overlay_mac(), config::host_mac());
        result.and_then(|()| skb::set_tunnel(ctx, config::overlay_vni(), &route.next_hop)).into()
    }
    outlined(ctx, route).unpack().map(|_| ())
}

#[inline(always)]
pub(crate) fn set_link_addresses(ctx: &impl Frame, dst: MacAddr, src: MacAddr) -> Result<(), DropReason> {
    with_header(ctx, 0, |eth: &mut EthHeader| eth.set_addresses(dst, src))
}

/// A redirect helper returns anything but `TC_ACT_REDIRECT` only if it refused its arguments.
#[inline(always)]
pub(super) fn redirect_result(action: i32, verdict: Verdict) -> Result<Verdict, DropReason> {
    if action == TC_ACT_REDIRECT { Ok(verdict) } else { Err(DropReason::BadRoute) }
}
