//! The end of every run: counts the outcome, reports it if it is a drop or tracing is on, and
//! translates a verdict into the action the kernel expects.

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_log_ebpf::debug;
use dataplane_common::{
    net::EtherType,
    reason::{DropReason, HookId, Verdict, counter_index},
};

use crate::{
    config, event,
    frame::{
        Frame,
        family::{V4, V6},
    },
    maps,
    scratch::Scratch,
};

/// Counts the outcome and sends an event for a drop, or for every packet with tracing on.
/// `tuple_recorded`: the packet's tuple is in `scratch.event` already, because the packet itself
/// may have changed since.
#[inline(always)]
pub(crate) fn record(
    ctx: &impl Frame,
    scratch: &mut Scratch,
    hook: HookId,
    result: Result<Verdict, DropReason>,
    tuple_recorded: bool,
) {
    let outcome = match result {
        Ok(verdict) => verdict.number(),
        Err(reason) => reason.number(),
    };
    maps::count(counter_index(hook, outcome));
    if result.is_err() || config::trace() {
        if !tuple_recorded {
            match ctx.ether_type() {
                EtherType::IPV4 => event::record_tuple::<V4>(ctx, scratch),
                EtherType::IPV6 => event::record_tuple::<V6>(ctx, scratch),
                _ => event::record_without_tuple(ctx, scratch),
            }
        }
        event::send(ctx, scratch, hook, outcome);
    }
    debug!(ctx, "hook {} outcome {} length {}", hook as u8, outcome, ctx.length());
}

/// The `TC_ACT_*` of a verdict. `TC_ACT_UNSPEC` (`TCX_NEXT`) lets other programs on the device see
/// the packet.
#[inline(always)]
pub(crate) const fn tc_action(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::ToPod
        | Verdict::ToWire
        | Verdict::ToOverlay
        | Verdict::ToOutside
        | Verdict::FragmentAgain
        | Verdict::NeighbourAnswered
        | Verdict::EchoAnswered => TC_ACT_REDIRECT,
        // the bytes of a held fragment are in REORDER_FRAGMENTS now
        Verdict::FragmentHeld | Verdict::NeighbourIgnored => TC_ACT_SHOT,
        _ => TC_ACT_UNSPEC,
    }
}

/// Counts the outcome of a cgroup hook and returns what the kernel expects of one: 1 to go on, 0 to
/// fail with `EPERM`.
#[inline(always)]
pub(crate) fn record_socket(hook: HookId, result: Result<Verdict, DropReason>) -> i32 {
    let (outcome, allow) = match result {
        Ok(verdict) => (verdict.number(), 1),
        Err(reason) => (reason.number(), 0),
    };
    maps::count(counter_index(hook, outcome));
    allow
}
