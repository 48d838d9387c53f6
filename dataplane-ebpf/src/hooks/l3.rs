//! Layer-3 devices (`WireGuard`, tun, IPIP), whose packets have no Ethernet header: three programs
//! beside those of an uplink.
//!
//! [`from_l3`] and [`to_l3`] run in front of `from_wire` and `to_wire` and give the packet an
//! Ethernet header, so that every stage knows one layout only. The kernel takes the header off a
//! packet that is redirected out of such a device (`net/core/filter.c`, `__bpf_redirect_no_mac`),
//! and its stack skips it. What `to_wire` lets pass must lose it again: [`leave_l3`], which runs
//! last, redirects the packet to the device it leaves by anyway.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    programs::TcContext,
};
use dataplane_common::{
    net::EthHeader,
    reason::{DropReason, HookId},
};

use crate::{event, frame::Frame as _, helpers::skb, scratch, verdict};

/// A packet arrives.
#[inline(always)]
pub(crate) fn from_l3(ctx: &TcContext) -> i32 {
    add_header(ctx, HookId::FromWire)
}

/// A packet leaves. One that a program has redirected here is complete.
#[inline(always)]
pub(crate) fn to_l3(ctx: &TcContext) -> i32 {
    if skb::is_handled(ctx) { TC_ACT_UNSPEC } else { add_header(ctx, HookId::ToWire) }
}

/// A packet leaves, behind `to_wire`. It passes the device's programs once more, with the mark.
#[inline(always)]
pub(crate) fn leave_l3(ctx: &TcContext) -> i32 {
    if skb::is_handled(ctx) {
        return TC_ACT_UNSPEC;
    }
    skb::mark_handled(ctx);
    skb::redirect(ctx.ifindex())
}

/// Adds an Ethernet header with addresses of zeros: a stage that redirects the packet to an
/// Ethernet device sets them. A packet that has no room for it is dropped, because the next program
/// would take its addresses for a header.
#[inline(always)]
fn add_header(ctx: &TcContext, hook: HookId) -> i32 {
    let added = skb::grow_head(ctx, EthHeader::LEN)
        .and_then(|()| ctx.write_u16(offset_of!(EthHeader, ether_type), ctx.ether_type().to_be()));
    if added.is_ok() {
        return TC_ACT_UNSPEC;
    }
    if let Some(scratch) = scratch::current() {
        event::record_without_tuple(ctx, scratch);
        verdict::record(ctx, scratch, hook, Err(DropReason::WriteFailed), true);
    }
    TC_ACT_SHOT
}
