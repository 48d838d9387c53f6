//! Network address translation, per packet, in both directions.
//!
//! A packet of a known flow is translated as its flow says: forward packets to the backend or to
//! the node's address, replies back. What a packet without a flow gets is the parameter of
//! [`translate`], an [`OnMiss`].

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    abi::NodeFlags,
    net::Protocol,
    reason::{DropReason, Verdict},
};

use super::{
    PackedResult, flow, icmp_error,
    on_miss::{self, OnMiss},
    parse, rewrite,
    route::{self, Destination},
};
use crate::{
    config,
    frame::{Frame, family::IpFamily, packet::Packet},
    helpers::is_zero,
    maps,
    scratch::Scratch,
};

/// Translates the packet if it belongs to a flow, in either direction; on a miss does what `M`
/// says, which may create a flow and translate the packet by it. True if it was translated: then
/// `scratch.nat_tuple` is its tuple.
///
/// A subprogram for each `M`. It parses the packet again, so that only the context enters it.
#[inline(always)]
pub(crate) fn translate<F: IpFamily, M: OnMiss>(
    ctx: &TcContext,
    scratch: &mut Scratch,
) -> Result<bool, DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily, M: OnMiss>(ctx: &TcContext, scratch: &mut Scratch) -> PackedResult {
        try_translate::<F, M>(ctx, scratch).into()
    }
    outlined::<F, M>(ctx, scratch).unpack()
}

/// Remembers the flow of a packet from outside of the cluster to a pod, so that the pod's answers
/// are not masqueraded. TCP needs none: its flags tell an answer.
#[inline(always)]
pub(crate) fn remember_inbound<F: IpFamily>(ctx: &TcContext, packet: &Packet<F>, scratch: &mut Scratch) {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> PackedResult {
        try_remember_inbound::<F>(ctx, scratch).into()
    }
    let is_tcp = is_zero(u32::from(packet.protocol ^ Protocol::TCP));
    if is_tcp == 0 && config::flag(NodeFlags::MASQUERADE) {
        // with the flow table full, the packet arrives all the same
        let _best_effort = outlined::<F>(ctx, scratch).unpack();
    }
}

#[inline(always)]
fn try_remember_inbound<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<bool, DropReason> {
    let packet = F::parse(ctx)?;
    // no address of this node: `source::check_wire`
    let is_in_cluster = maps::route(&packet.src).is_some();
    if is_in_cluster || !packet.has_transport() || packet.is_icmp_error(ctx) {
        return Ok(false);
    }
    find_tuple::<F, on_miss::RememberInbound>(ctx, &packet, scratch)
}

/// Translates a packet of the host's stack to `destination` if it is the reply of a host process
/// that was reached through a service: its source becomes the frontend.
#[inline(always)]
pub(crate) fn translate_host_reply<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    destination: &Destination,
    scratch: &mut Scratch,
) -> Result<Verdict, DropReason> {
    let translated = destination.may_have_flow(ctx, packet) && translate::<F, on_miss::Pass>(ctx, scratch)?;
    Ok(if translated { Verdict::Restored } else { Verdict::Delivered })
}

#[inline(always)]
fn try_translate<F: IpFamily, M: OnMiss>(ctx: &TcContext, scratch: &mut Scratch) -> Result<bool, DropReason> {
    let packet = F::parse(ctx)?;
    scratch.nat.bypasses_stack = 0;
    scratch.nat.hop_limit = packet.hop_limit.into();
    if packet.is_icmp_error(ctx) {
        return icmp_error::translate::<F>(ctx, &packet, scratch, M::forward_kinds(scratch));
    }
    if !find_tuple::<F, M>(ctx, &packet, scratch)? {
        return Ok(false);
    }
    // before the rewrite, because the ICMP error must quote the packet as its sender knows it
    route::check_limits::<F>(ctx, scratch)?;
    if !scratch.nat.is_direct() {
        rewrite::tuple(ctx, &packet, scratch)?;
    }
    Ok(true)
}

/// Looks up or creates the flow of a packet, which must not be an ICMP error. True if there is one:
/// then the tuple the packet is to be rewritten to is in `scratch.nat_tuple`.
#[inline(always)]
pub(crate) fn find_tuple<F: IpFamily, M: OnMiss>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    scratch: &mut Scratch,
) -> Result<bool, DropReason> {
    parse::tuple(ctx, packet, scratch)?;
    Ok(flow::lookup(scratch, M::forward_kinds(scratch)) || M::create_flow::<F>(ctx, scratch)?)
}
