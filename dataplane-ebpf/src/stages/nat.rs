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
    flow, icmp_error,
    on_miss::{self, OnMiss},
    parse, rewrite,
    route::{self, Destination},
};
use crate::{
    config,
    frame::{Frame, family::IpFamily, packet::Packet},
    global::{self, PackedResult, global_functions},
    helpers::is_zero,
    maps,
    scratch::Scratch,
};

/// Translates the packet if it belongs to a flow, in either direction; on a miss does what `M`
/// says, which may create a flow and translate the packet by it. True if it was translated: then
/// `scratch.nat_tuple` is its tuple.
///
/// A global function for each `M`, which parses the packet again.
#[inline(always)]
pub(crate) fn translate<F: IpFamily, M: Translate>(
    ctx: &TcContext,
    scratch: &mut Scratch,
) -> Result<bool, DropReason> {
    let mut result = global::call(scratch, || M::call_translate::<F>(ctx));
    if result.is_other() {
        let forward_kinds = M::forward_kinds(scratch);
        result = icmp_error::translate::<F>(ctx, scratch, forward_kinds);
    }
    result.unpack()
}

/// An [`OnMiss`] with global functions at tc.
pub(crate) trait Translate: OnMiss {
    /// Calls the [`try_translate`] of the family.
    fn call_translate<F: IpFamily>(ctx: &TcContext) -> u32;

    /// Calls the [`OnMiss::plan_flow`] of the family.
    fn call_plan_flow<F: IpFamily>(ctx: &TcContext) -> u32;
}

global_functions! {
    call_translate: translate_v4, translate_v6 = run(try_translate::<on_miss::Pass>);
    call_translate_or_select: translate_or_select_v4, translate_or_select_v6
        = run(try_translate::<on_miss::SelectBackend>);
    call_translate_or_masquerade: translate_or_masquerade_v4, translate_or_masquerade_v6
        = run(try_translate::<on_miss::Masquerade>);
    call_translate_from_pod: translate_from_pod_v4, translate_from_pod_v6
        = run(try_translate::<on_miss::SelectBackendOrMasquerade>);
    call_plan_service: plan_service_v4, plan_service_v6 = run(plan_flow::<on_miss::SelectBackend>);
    call_plan_masquerade: plan_masquerade_v4, plan_masquerade_v6 = run(plan_flow::<on_miss::Masquerade>);
    call_plan_from_pod: plan_from_pod_v4, plan_from_pod_v6
        = run(plan_flow::<on_miss::SelectBackendOrMasquerade>);
    call_remember_inbound: remember_inbound_v4, remember_inbound_v6 = run(try_remember_inbound);
}

impl Translate for on_miss::Pass {
    #[inline(always)]
    fn call_translate<F: IpFamily>(ctx: &TcContext) -> u32 {
        call_translate::<F>(ctx)
    }

    #[inline(always)]
    fn call_plan_flow<F: IpFamily>(_ctx: &TcContext) -> u32 {
        PackedResult::from(false).raw()
    }
}

macro_rules! translate_by {
    ($($miss:ident: $translate:ident, $plan:ident;)+) => {$(
        impl Translate for on_miss::$miss {
            #[inline(always)]
            fn call_translate<F: IpFamily>(ctx: &TcContext) -> u32 {
                $translate::<F>(ctx)
            }

            #[inline(always)]
            fn call_plan_flow<F: IpFamily>(ctx: &TcContext) -> u32 {
                $plan::<F>(ctx)
            }
        }
    )+};
}

translate_by! {
    SelectBackend: call_translate_or_select, call_plan_service;
    Masquerade: call_translate_or_masquerade, call_plan_masquerade;
    SelectBackendOrMasquerade: call_translate_from_pod, call_plan_from_pod;
}

#[inline(always)]
fn plan_flow<F: IpFamily, M: OnMiss>(ctx: &TcContext, scratch: &mut Scratch) -> Result<bool, DropReason> {
    M::plan_flow::<F>(ctx, scratch)
}

/// Remembers the flow of a packet from outside of the cluster to a pod, so that the pod's answers
/// are not masqueraded. TCP needs none: its flags tell an answer.
#[inline(always)]
pub(crate) fn remember_inbound<F: IpFamily>(ctx: &TcContext, packet: &Packet<F>, scratch: &mut Scratch) {
    let is_tcp = is_zero(u32::from(packet.protocol ^ Protocol::TCP));
    if is_tcp == 0 && config::flag(NodeFlags::MASQUERADE) {
        // with the flow table full, the packet arrives all the same
        let _best_effort = global::call(scratch, || call_remember_inbound::<F>(ctx)).unpack();
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

/// [`PackedResult::OTHER`] for an ICMP error, which takes more of the stack than is left here.
#[inline(always)]
fn try_translate<F: IpFamily, M: Translate>(ctx: &TcContext, scratch: &mut Scratch) -> PackedResult {
    match F::parse(ctx) {
        Ok(packet) => {
            scratch.nat.bypasses_stack = 0;
            scratch.nat.hop_limit = packet.hop_limit.into();
            if packet.is_icmp_error(ctx) {
                return PackedResult::OTHER;
            }
            translate_packet::<F, M>(ctx, &packet, scratch).into()
        }
        Err(reason) => Err::<bool, _>(reason).into(),
    }
}

#[inline(always)]
fn translate_packet<F: IpFamily, M: Translate>(
    ctx: &TcContext,
    packet: &Packet<F>,
    scratch: &mut Scratch,
) -> Result<bool, DropReason> {
    parse::tuple(ctx, packet, scratch)?;
    if !has_flow::<M>(scratch) {
        if !global::call(scratch, || M::call_plan_flow::<F>(ctx)).unpack()? {
            return Ok(false);
        }
        flow::create(scratch)?;
    }
    // before the rewrite, because the ICMP error must quote the packet as its sender knows it
    route::check_limits::<F>(ctx, scratch)?;
    if !scratch.nat.is_direct() {
        rewrite::tuple(ctx, packet, scratch)?;
    }
    Ok(true)
}

/// Looks up the flow of a packet, unless it is known to have none.
#[inline(always)]
fn has_flow<M: OnMiss>(scratch: &mut Scratch) -> bool {
    if scratch.next_hop.missed != 0 {
        // once translated, the packet may have one
        scratch.next_hop.missed = 0;
        scratch.new_flow.replaced_epoch = 0;
        return false;
    }
    flow::lookup(scratch, M::forward_kinds(scratch))
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
    if !has_flow::<M>(scratch) {
        if !M::plan_flow::<F>(ctx, scratch)? {
            return Ok(false);
        }
        flow::create(scratch)?;
    }
    Ok(true)
}
