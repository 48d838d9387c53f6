//! The end of every run: counts the outcome, reports it if somebody should know, and tells the kernel.

use aya_ebpf::{
    bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::debug;
use dataplane_common::{
    net::EtherType,
    reason::{DropReason, Hook, Verdict, counter_index},
};

use crate::{
    config, event,
    family::{IpFamily, V4, V6},
    maps::{self, Work},
    packet::Frame,
    stages::{held, reject},
};

/// A place in the path of a packet: what a file in `hooks` is.
pub(crate) trait Place {
    /// The packet as it is there.
    type Context: Frame;

    const HOOK: Hook;

    /// What happens to a packet here. The order of the stages, and nothing else.
    fn run<F: IpFamily>(ctx: &Self::Context, work: &mut Work) -> Result<Verdict, DropReason>;
}

/// Runs a place of tc on a packet.
#[inline(always)]
pub(crate) fn classify<P: Place<Context = TcContext>>(ctx: &TcContext) -> i32 {
    let Some(work) = maps::work() else { return TC_ACT_UNSPEC };
    let result = match ctx.ether_type() {
        EtherType::IPV4 => run::<P, V4>(ctx, work),
        EtherType::IPV6 => run::<P, V6>(ctx, work),
        _ => (Ok(Verdict::StackNotIp), false),
    };
    finish(ctx, work, P::HOOK, result)
}

/// What became of the packet, and whether its sender has been told.
#[inline(always)]
fn run<P: Place<Context = TcContext>, F: IpFamily>(
    ctx: &TcContext,
    work: &mut Work,
) -> (Result<Verdict, DropReason>, bool) {
    work.holds = u32::from(held::holds(P::HOOK));
    let result = match P::run::<F>(ctx, work) {
        Err(DropReason::FragmentUnknown) if held::holds(P::HOOK) => held::hold(ctx, work),
        Err(DropReason::FragmentOvertaken) if held::holds(P::HOOK) => held::follow(ctx, work),
        result => result,
    };
    let refused = match result {
        Err(reason) if is_told(reason) => {
            // a refusal makes a message of the packet
            event::describe::<F>(ctx, work);
            reject::refuse::<F>(ctx, work, P::HOOK, reason)
        }
        _ => false,
    };
    (result, refused)
}

/// Whether a sender hears of it.
#[inline(always)]
const fn is_told(reason: DropReason) -> bool {
    matches!(reason, DropReason::NoBackend | DropReason::NoPort | DropReason::TooBig)
}

#[inline(always)]
fn finish(
    ctx: &TcContext,
    work: &mut Work,
    hook: Hook,
    (result, refused): (Result<Verdict, DropReason>, bool),
) -> i32 {
    let is_described = matches!(result, Err(reason) if is_told(reason));
    record(ctx, work, hook, result, is_described);
    match result {
        Ok(verdict) => action(verdict),
        Err(_) if refused => TC_ACT_REDIRECT,
        Err(_) => TC_ACT_SHOT,
    }
}

/// Runs a place of the driver on a packet. What is not sent back out of the device goes on to tc.
#[inline(always)]
pub(crate) fn drive<P: Place<Context = XdpContext>>(ctx: &XdpContext) -> u32 {
    let Some(work) = maps::work() else { return xdp_action::XDP_PASS };
    work.holds = 0;
    let result = match ctx.ether_type() {
        EtherType::IPV4 => P::run::<V4>(ctx, work),
        EtherType::IPV6 => P::run::<V6>(ctx, work),
        _ => Ok(Verdict::StackNotIp),
    };
    record(ctx, work, P::HOOK, result, false);
    match result {
        Ok(Verdict::ToWire | Verdict::ToOutside) => xdp_action::XDP_TX,
        Ok(_) => xdp_action::XDP_PASS,
        Err(_) => xdp_action::XDP_DROP,
    }
}

/// Counts what became of a packet, and says it to who wants to know. Which packet it was is in `work.event`, or yet to be read.
#[inline(always)]
fn record(
    ctx: &impl Frame,
    work: &mut Work,
    hook: Hook,
    result: Result<Verdict, DropReason>,
    is_described: bool,
) {
    let outcome = match result {
        Ok(verdict) => verdict.number(),
        Err(reason) => reason.number(),
    };
    maps::count(counter_index(hook, outcome));
    if result.is_err() || config::trace() {
        if !is_described {
            match ctx.ether_type() {
                EtherType::IPV4 => event::describe::<V4>(ctx, work),
                EtherType::IPV6 => event::describe::<V6>(ctx, work),
                _ => event::describe_unknown(ctx, work),
            }
        }
        event::report(ctx, work, hook, outcome);
    }
    debug!(ctx, "hook {} outcome {} length {}", hook as u8, outcome, ctx.length());
}

/// What the kernel is told. "Next" (`TCX_NEXT`, in clsact "unspecified") lets other programs of the device see the packet.
#[inline(always)]
const fn action(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::ToPod
        | Verdict::ToWire
        | Verdict::ToOverlay
        | Verdict::ToOutside
        | Verdict::FragmentAgain => TC_ACT_REDIRECT,
        // its bytes are elsewhere
        Verdict::FragmentHeld => TC_ACT_SHOT,
        _ => TC_ACT_UNSPEC,
    }
}

/// Counts the outcome of a socket hook. `allow` is what these hooks return: 1 goes on, 0 is an error (`EPERM`).
#[inline(always)]
pub(crate) fn socket(hook: Hook, result: Result<Verdict, DropReason>) -> i32 {
    let (outcome, allow) = match result {
        Ok(verdict) => (verdict.number(), 1),
        Err(reason) => (reason.number(), 0),
    };
    maps::count(counter_index(hook, outcome));
    allow
}
