//! A pod's packet to outside of the cluster leaves by the kernel's route, past its stack: neither
//! direction of the connection passes netfilter, which would take one without the other for
//! invalid.
//!
//! What only the stack can forward takes it in both directions ([`FlowFlags::STACK`]): no usable
//! route, a route through a device without programs, a packet above the route's MTU.
//!
//! [`FlowFlags::STACK`]: dataplane_common::abi::FlowFlags::STACK

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    net::TcpHeader,
    reason::{DropReason, Verdict},
};

use super::{
    next_hop,
    route::{self, Destination},
};
use crate::{
    config,
    frame::{Frame, L3, family::IpFamily, packet::Packet},
    global::{self, global_functions},
    helpers::{
        fib::{self, NextHop},
        skb,
    },
    maps,
    scratch::Scratch,
};

/// Sets `scratch.egress` to the way of a pod's packet to `destination`.
#[inline(always)]
pub(crate) fn find<F: IpFamily>(ctx: &TcContext, destination: &Destination, scratch: &mut Scratch) {
    scratch.egress.ifindex = 0;
    scratch.egress.masquerade = 0;
    if let Destination::Outside { masquerade } = destination
        && !config::egress_stack()
    {
        let _found = global::call(scratch, || call_find_egress::<F>(ctx));
        let leaves_past_stack = scratch.egress.ifindex != 0;
        scratch.egress.masquerade = u32::from(*masquerade && leaves_past_stack);
    }
}

global_functions! {
    call_find_egress: find_egress_v4, find_egress_v6 = run(try_find);
}

#[inline(always)]
fn try_find<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> bool {
    let egress = &mut scratch.egress;
    let Ok(packet) = F::parse(ctx) else { return false };
    // the stack answers "time exceeded"; and answers to a source that the pod is only allowed
    // (`ALLOWED_SOURCES`) arrive by the stack
    if packet.hop_limit <= 1 || maps::endpoint(&packet.src).is_none() {
        return false;
    }
    match fib::fib_lookup(ctx, &packet.src, &packet.dst, length(ctx, &packet)) {
        NextHop::Resolved { ifindex, next_hop, .. } | NextHop::Unresolved { ifindex, next_hop } => {
            if maps::device(ifindex).is_some() {
                egress.ifindex = ifindex;
                egress.next_hop = next_hop;
            }
        }
        NextHop::None => {}
    }
    egress.ifindex != 0
}

/// Whether the kernel's stack delivers a packet that arrived for a pod of this node: the pod's
/// answers take the stack.
#[inline(always)]
pub(crate) fn stack_delivers<F: IpFamily>(packet: &Packet<F>) -> Result<bool, DropReason> {
    Ok(config::egress_stack() && matches!(route::lookup(&packet.src)?, Destination::Outside { .. }))
}

/// Bytes of the IP packet, or of each packet it will be cut into, at least.
#[inline(always)]
pub(super) fn length<F: IpFamily>(ctx: &TcContext, packet: &Packet<F>) -> u16 {
    let headers = (packet.l4 - L3 + TcpHeader::LEN) as u16;
    match skb::gso_size(ctx) {
        0 => (ctx.length() as u16).saturating_sub(L3 as u16),
        segment => headers.saturating_add(segment as u16),
    }
}

/// Sends a packet, translated or not, the way `scratch.egress`.
#[inline(always)]
pub(crate) fn send<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
    next_hop::cache::<F>(ctx, scratch);
    route::leave::<F>(ctx, scratch.egress.ifindex, &scratch.egress.next_hop)
}
