//! Runs a hook on a packet: picks the IP family, calls the hook, and ends the run with a verdict or
//! a drop reason.

use aya_ebpf::{
    bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    programs::{TcContext, XdpContext},
};
use dataplane_common::{
    abi::Endpoint,
    net::EtherType,
    reason::{DropReason, HookId, Verdict},
};

use crate::{
    event,
    frame::{
        Frame,
        family::{IpFamily, V4, V6},
    },
    maps,
    scratch::{self, Scratch},
    stages::{reject, reorder},
    verdict,
};

/// An attach point: what the other files of this directory implement.
pub(crate) trait Hook {
    /// The packet as the kernel passes it to programs of this type.
    type Context: Frame;

    /// Its number in counters and events.
    const ID: HookId;

    /// Looks at the frame before its packet: a verdict or a drop ends the run.
    #[inline(always)]
    fn check_frame(_ctx: &Self::Context) -> Result<Option<Verdict>, DropReason> {
        Ok(None)
    }

    /// What happens to a frame that has no IP packet.
    #[inline(always)]
    fn run_not_ip(_ctx: &Self::Context, _ether_type: u16) -> Result<Verdict, DropReason> {
        Ok(Verdict::StackNotIp)
    }

    /// What happens to a packet here: the order of the stages, and nothing else.
    fn run<F: IpFamily>(ctx: &Self::Context, scratch: &mut Scratch) -> Result<Verdict, DropReason>;
}

/// Runs a tc hook on a packet and returns a `TC_ACT_*`.
#[inline(always)]
pub(crate) fn run_tc<H: Hook<Context = TcContext>>(ctx: &TcContext) -> i32 {
    let Some(scratch) = scratch::current() else { return TC_ACT_UNSPEC };
    let (result, icmp_sent) = match H::check_frame(ctx) {
        Ok(None) => match ctx.ether_type() {
            EtherType::IPV4 => run_tc_family::<H, V4>(ctx, scratch),
            EtherType::IPV6 => run_tc_family::<H, V6>(ctx, scratch),
            ether_type => (H::run_not_ip(ctx, ether_type), false),
        },
        Ok(Some(verdict)) => (Ok(verdict), false),
        Err(reason) => (Err(reason), false),
    };
    let tuple_recorded = matches!(result, Err(reason) if sends_icmp_error(reason));
    verdict::record(ctx, scratch, H::ID, result, tuple_recorded);
    match result {
        Ok(verdict) => verdict::tc_action(verdict),
        Err(_) if icmp_sent => TC_ACT_REDIRECT,
        Err(_) => TC_ACT_SHOT,
    }
}

/// Returns the result of the hook, and whether an ICMP error is on its way to the sender.
#[inline(always)]
fn run_tc_family<H: Hook<Context = TcContext>, F: IpFamily>(
    ctx: &TcContext,
    scratch: &mut Scratch,
) -> (Result<Verdict, DropReason>, bool) {
    scratch.next_hop.clear();
    scratch.reorder.enabled = u32::from(reorder::is_enabled(H::ID));
    scratch.reorder.key.packet.hook = H::ID as u8;
    let result = match H::run::<F>(ctx, scratch) {
        Err(DropReason::FragmentUnknown) if reorder::is_enabled(H::ID) => {
            match reorder::buffer_early_fragment(ctx, scratch) {
                // the host reassembles its own packets; one of a service lacks this fragment
                Err(DropReason::FragmentUnknown) if is_for_host::<F>(ctx) => Ok(Verdict::StackHost),
                result => result,
            }
        }
        Err(DropReason::FragmentOvertaken) if reorder::is_enabled(H::ID) => {
            reorder::replay_early_fragment(ctx, scratch)
        }
        result => result,
    };
    let icmp_sent = match result {
        Err(reason) if sends_icmp_error(reason) => {
            // before the packet is turned into the ICMP error
            event::record_tuple::<F>(ctx, scratch);
            reject::send_icmp_error::<F>(ctx, scratch, H::ID, reason)
        }
        _ => false,
    };
    (result, icmp_sent)
}

/// Whether the packet is addressed to the host itself.
#[inline(always)]
fn is_for_host<F: IpFamily>(ctx: &TcContext) -> bool {
    F::parse(ctx).is_ok_and(|packet| maps::endpoint(&packet.dst).is_some_and(Endpoint::is_host))
}

/// Whether the sender of a packet dropped for this reason gets an ICMP error.
#[inline(always)]
const fn sends_icmp_error(reason: DropReason) -> bool {
    matches!(reason, DropReason::NoBackend | DropReason::NoPort | DropReason::TooBig | DropReason::TtlExpired)
}

/// Runs an XDP hook on a packet and returns an `XDP_*` action. What is not sent back out of the
/// device goes on to tc.
#[inline(always)]
pub(crate) fn run_xdp<H: Hook<Context = XdpContext>>(ctx: &XdpContext) -> u32 {
    let Some(scratch) = scratch::current() else { return xdp_action::XDP_PASS };
    scratch.next_hop.clear();
    scratch.reorder.enabled = 0;
    let result = match ctx.ether_type() {
        EtherType::IPV4 => H::run::<V4>(ctx, scratch),
        EtherType::IPV6 => H::run::<V6>(ctx, scratch),
        _ => Ok(Verdict::StackNotIp),
    };
    verdict::record(ctx, scratch, H::ID, result, false);
    match result {
        Ok(Verdict::ToWire | Verdict::ToOutside) => xdp_action::XDP_TX,
        Ok(_) => xdp_action::XDP_PASS,
        Err(_) => xdp_action::XDP_DROP,
    }
}
