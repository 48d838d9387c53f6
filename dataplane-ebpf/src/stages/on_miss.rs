//! What happens to a packet that belongs to no flow: it gets a backend, it is masqueraded, or it
//! passes.

use dataplane_common::{
    abi::{Addr, Endpoint, FlowFlags, NodeFlags, Port, ServiceFlags, ServiceKey},
    flow::tcp_flags,
    hash,
    net::{EthHeader, Protocol},
    reason::DropReason,
};

use super::{flow, parse::Transport, service};
use crate::{
    config,
    frame::{Frame, family::IpFamily},
    helpers::random,
    maps,
    scratch::Scratch,
};

/// The parameter of [`nat::translate`](super::nat::translate): what to do on a miss in the flow
/// table.
pub(crate) trait OnMiss {
    /// Kinds of flows ([`flow::kinds`]) whose forward packets are translated here: those that are
    /// created here. Replies of every kind are translated everywhere. A pod's packet to the outside
    /// may pass two hooks, and its flow belongs to one.
    fn forward_kinds(scratch: &Scratch) -> u32;

    /// Whether the packet with tuple `scratch.tuple` is to have a flow: then it is
    /// `scratch.new_flow`.
    fn plan_flow<F: IpFamily>(ctx: &impl Frame, scratch: &mut Scratch) -> Result<bool, DropReason>;
}

/// Creates no flow: the packet passes untranslated.
pub(crate) enum Pass {}

/// Selects a backend, if the packet is addressed to a frontend.
pub(crate) enum SelectBackend {}

/// Translates the source to the node's address, if the node masquerades, after the kernel's stack
/// has forwarded the packet.
pub(crate) enum Masquerade {}

/// Selects a backend, if the packet is addressed to a frontend; else, if the packet leaves past the
/// kernel's stack (`scratch.egress`), translates the source as [`Masquerade`] does.
pub(crate) enum SelectBackendOrMasquerade {}

/// As [`SelectBackend`], for a frame whose addressee is not known yet: one for another station gets
/// no flow.
pub(crate) enum SelectBackendAtDriver {}

/// Remembers that a client outside of the cluster has addressed a pod, so that the pod's answers
/// are not masqueraded.
pub(crate) enum RememberInbound {}

impl OnMiss for Pass {
    #[inline(always)]
    fn forward_kinds(_scratch: &Scratch) -> u32 {
        flow::kinds::ANY
    }

    #[inline(always)]
    fn plan_flow<F: IpFamily>(_ctx: &impl Frame, _scratch: &mut Scratch) -> Result<bool, DropReason> {
        Ok(false)
    }
}

impl OnMiss for Masquerade {
    #[inline(always)]
    fn forward_kinds(_scratch: &Scratch) -> u32 {
        flow::kinds::MASQUERADE | flow::kinds::VIA_STACK
    }

    #[inline(always)]
    fn plan_flow<F: IpFamily>(ctx: &impl Frame, scratch: &mut Scratch) -> Result<bool, DropReason> {
        masquerade::<F>(scratch, ctx.ifindex(), FlowFlags::STACK)
    }
}

impl OnMiss for SelectBackendOrMasquerade {
    #[inline(always)]
    fn forward_kinds(scratch: &Scratch) -> u32 {
        if scratch.egress.ifindex == 0 { flow::kinds::SERVICE } else { flow::kinds::ANY }
    }

    #[inline(always)]
    fn plan_flow<F: IpFamily>(ctx: &impl Frame, scratch: &mut Scratch) -> Result<bool, DropReason> {
        if SelectBackend::plan_flow::<F>(ctx, scratch)? {
            return Ok(true);
        }
        if scratch.egress.masquerade == 0 {
            return Ok(false);
        }
        masquerade::<F>(scratch, scratch.egress.ifindex, 0)
    }
}

/// The flow of a pod's packet that leaves by the device `ifindex`, unless the packet is an
/// answer or the node does not masquerade. `flags`: bits of [`FlowFlags`].
#[inline(always)]
fn masquerade<F: IpFamily>(scratch: &mut Scratch, ifindex: u32, flags: u32) -> Result<bool, DropReason> {
    if is_reply(scratch) {
        return Ok(false);
    }
    let source = source_of::<F>(ifindex);
    if !config::flag(NodeFlags::MASQUERADE) || source.is_zero() {
        return Ok(false);
    }
    if is_tunnel_port(scratch.tuple.protocol, scratch.tuple.dst_port) {
        return Err(DropReason::TunnelPort);
    }
    plan_without_backend(scratch, source, flags);
    Ok(true)
}

impl OnMiss for RememberInbound {
    #[inline(always)]
    fn forward_kinds(_scratch: &Scratch) -> u32 {
        flow::kinds::MASQUERADE
    }

    #[inline(always)]
    fn plan_flow<F: IpFamily>(_ctx: &impl Frame, scratch: &mut Scratch) -> Result<bool, DropReason> {
        if is_reply(scratch) || scratch.transport & Transport::HANDSHAKE != 0 {
            return Ok(false);
        }
        plan_without_backend(scratch, Addr::UNSPECIFIED, FlowFlags::INBOUND);
        Ok(true)
    }
}

/// The flow of a packet whose destination stays. `snat_source` as in
/// [`NewFlow`](crate::scratch::NewFlow).
#[inline(always)]
fn plan_without_backend(scratch: &mut Scratch, snat_source: Addr, flags: u32) {
    let new_flow = &mut scratch.new_flow;
    new_flow.reply_tuple = scratch.tuple.reversed();
    new_flow.snat_source = snat_source;
    new_flow.service_id = 0;
    new_flow.backend_id = 0;
    new_flow.backend_generation = 0;
    new_flow.flags = flags;
    new_flow.prefers_range_port = 0;
}

/// Whether the packet would pass for one of the tunnel, if its source became the node's.
#[inline(always)]
fn is_tunnel_port(protocol: u8, port: Port) -> bool {
    protocol == Protocol::UDP && port == config::overlay_port()
}

/// Whether a packet without a flow answers another: it does not begin a connection (TCP, SCTP), or
/// is an echo reply.
#[inline(always)]
fn is_reply(scratch: &Scratch) -> bool {
    let transport = scratch.transport;
    if transport & Transport::HANDSHAKE != 0 {
        return !tcp_flags::is_initial_syn(transport as u8);
    }
    transport & (Transport::ECHO | Transport::ECHO_REQUEST) == Transport::ECHO
}

impl OnMiss for SelectBackend {
    #[inline(always)]
    fn forward_kinds(_scratch: &Scratch) -> u32 {
        flow::kinds::SERVICE
    }

    #[inline(always)]
    fn plan_flow<F: IpFamily>(ctx: &impl Frame, scratch: &mut Scratch) -> Result<bool, DropReason> {
        if !service::lookup_frontend(scratch)? {
            return if is_cluster_ip::<F>(scratch) { Err(DropReason::NoPort) } else { Ok(false) };
        }
        // a connection of the host itself may use a frontend's address and port as its source
        if service::is_mid_connection(scratch) && ctx.has_connected_socket(&scratch.tuple) {
            return Ok(false);
        }
        let service = &scratch.service;
        // without direct server return the other node translates its node ports itself
        if scratch.frontend_query.addr_of_other_node != 0 && service.flags & ServiceFlags::DSR == 0 {
            return Ok(false);
        }
        if service.flags & ServiceFlags::SOURCE_RANGES != 0
            && !maps::is_source_allowed(service.id, &scratch.tuple.src)
        {
            return Err(DropReason::SourceRange);
        }
        let hash = if service.flags & ServiceFlags::HASH == 0 {
            random::random()
        } else {
            hash::tuple(&scratch.tuple)
        };
        let backend = service::select_packets_backend(scratch, hash)?;
        let (tuple, service) = (&scratch.tuple, &scratch.service);
        let direct = service::uses_direct_return(service, backend, scratch);
        let keeps_source = direct
            || !(service::needs_snat(service, backend, scratch)
                || is_of_other_device::<F>(&tuple.src, &backend.addr));
        if !keeps_source && is_tunnel_port(tuple.protocol, backend.port) {
            return Err(DropReason::TunnelPort);
        }
        // a socket that is translated at `sendmsg()` too has that port in use at the backend
        let prefers_range_port = tuple.protocol == Protocol::UDP
            && scratch.frontend_query.from_outside == 0
            && (config::flag(NodeFlags::CONNECT_UDP) || ctx.has_unconnected_socket(tuple.src_port));

        let new_flow = &mut scratch.new_flow;
        new_flow.reply_tuple.src = backend.addr;
        new_flow.reply_tuple.src_port = backend.port;
        new_flow.reply_tuple.dst = tuple.src;
        new_flow.reply_tuple.dst_port = tuple.src_port;
        new_flow.reply_tuple.protocol = tuple.protocol;
        new_flow.snat_source =
            if keeps_source { Addr::UNSPECIFIED } else { snat_address::<F>(&backend.addr)? };
        new_flow.service_id = service.id;
        new_flow.backend_id = backend.id;
        new_flow.backend_generation = backend.generation;
        new_flow.flags = FlowFlags::SERVICE | if direct { FlowFlags::DIRECT } else { 0 };
        new_flow.prefers_range_port = u32::from(prefers_range_port);
        Ok(true)
    }
}

impl OnMiss for SelectBackendAtDriver {
    #[inline(always)]
    fn forward_kinds(scratch: &Scratch) -> u32 {
        SelectBackend::forward_kinds(scratch)
    }

    #[inline(always)]
    fn plan_flow<F: IpFamily>(ctx: &impl Frame, scratch: &mut Scratch) -> Result<bool, DropReason> {
        let eth: EthHeader = ctx.read(0)?;
        if maps::device(ctx.ifindex()).is_none_or(|device| device.mac != eth.dst) {
            return Ok(false);
        }
        SelectBackend::plan_flow::<F>(ctx, scratch)
    }
}

/// Whether the packet is addressed to a port of a cluster IP, which has no such port: the frontend
/// lookup missed.
#[inline(always)]
fn is_cluster_ip<F: IpFamily>(scratch: &Scratch) -> bool {
    let tuple = &scratch.tuple;
    F::cluster_range().contains(&tuple.dst)
        && Protocol::has_ports(tuple.protocol)
        && maps::has_service(&ServiceKey::of_address(tuple.dst))
}

/// The source of translated packets that leave by a device: its address, else the node's; `::` if
/// there is neither.
#[inline(always)]
pub(super) fn source_of<F: IpFamily>(ifindex: u32) -> Addr {
    match maps::device(ifindex) {
        Some(device) if !F::device_address(device).is_zero() => F::device_address(device),
        _ => F::node_address(),
    }
}

/// Whether a process of this node sends to a backend on another node from the address of another
/// device: the stack chose it by its route to the service. The other node may have no route back to
/// it, and refuses it in the tunnel.
#[inline(always)]
fn is_of_other_device<F: IpFamily>(src: &Addr, backend: &Addr) -> bool {
    maps::endpoint(src).is_some_and(Endpoint::is_host)
        && maps::route(backend).is_some_and(|route| route.is_node() && source_of::<F>(route.ifindex) != *src)
}

/// The address that replaces the client's in packets to a backend: of the device by which they
/// leave for another node, else the node's.
#[inline(always)]
fn snat_address<F: IpFamily>(backend: &Addr) -> Result<Addr, DropReason> {
    let addr = source_of::<F>(maps::route(backend).map_or(0, |route| route.ifindex));
    if addr.is_zero() { Err(DropReason::NoSourceAddress) } else { Ok(addr) }
}
