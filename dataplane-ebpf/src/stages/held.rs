//! Fragments that come before their first, which alone has the ports.
//!
//! Nothing here can make a packet wait. So the bytes of such a fragment go into a table, and its frame ends. When the first one
//! comes, its frame is doubled: one of the two begins anew; the other becomes the fragment that was held, and begins anew
//! behind it. If more are held, the first meets the next as it comes again.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, programs::TcContext};
use dataplane_common::reason::{DropReason, Hook, Verdict};

use super::{Answer, opaque};
use crate::{
    family::L3,
    maps::{self, HELD_BYTES, Work},
    packet::Frame,
    skb,
};

/// Of one packet: 64 KiB in pieces of 1,400 bytes.
const HELD_PER_PACKET: u32 = 48;

/// Whether fragments are held at a place: where frames come in, and may come in again.
#[inline(always)]
pub(crate) const fn holds(hook: Hook) -> bool {
    matches!(hook, Hook::FromPod | Hook::FromWire | Hook::FromOverlay)
}

/// What becomes of a fragment (`work.fragment`) whose first has not been seen.
#[inline(always)]
pub(crate) fn hold(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
    #[inline(never)]
    fn outlined(ctx: &TcContext, work: &mut Work) -> Answer {
        keep(ctx, work).into()
    }
    if outlined(ctx, work).get()? { Ok(Verdict::FragmentHeld) } else { begin_anew(ctx) }
}

/// What becomes of a first fragment (`work.fragment`) that others came before.
#[inline(always)]
pub(crate) fn follow(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
    #[inline(never)]
    fn outlined(ctx: &TcContext, work: &mut Work) -> Answer {
        turn_into_last(ctx, work).map(|()| true).into()
    }
    outlined(ctx, work).get()?;
    begin_anew(ctx)
}

#[inline(always)]
fn begin_anew(ctx: &TcContext) -> Result<Verdict, DropReason> {
    match skb::redirect_ingress(ctx.ifindex()) {
        TC_ACT_REDIRECT => Ok(Verdict::FragmentAgain),
        _ => Err(DropReason::FragmentOvertaken),
    }
}

/// The length, if it is one that is held. In a way that tells the verifier of Linux 5.10, which learns nothing from "not 0".
#[inline(always)]
fn bounded(length: usize) -> Option<usize> {
    let last = opaque((length as u64).wrapping_sub(1));
    (last < HELD_BYTES as u64).then_some(last as usize + 1)
}

/// Whether the fragment is held; if not, its first has come meanwhile.
#[inline(always)]
fn keep(ctx: &TcContext, work: &mut Work) -> Result<bool, DropReason> {
    let Some(room) = maps::held_room() else { return Err(DropReason::FragmentUnknown) };
    let length = (ctx.length() as usize).wrapping_sub(L3);
    let Some(length) = bounded(length) else { return Err(DropReason::FragmentUnknown) };
    skb::load(ctx, L3, &mut room.bytes, length)?;
    room.length = length as u32;
    room.came = skb::now();
    for index in 0..HELD_PER_PACKET {
        work.fragment.index = index;
        if maps::held(&work.fragment).is_none() && maps::hold(&work.fragment, room) {
            // the first looks for what is held once it is known: of the two, one finds the other
            let alone = maps::fragment_ports(&work.fragment.packet).is_none();
            return Ok(alone || !maps::let_go(&work.fragment));
        }
    }
    Err(DropReason::FragmentUnknown)
}

/// Doubles the frame, and makes of this one the fragment that is held last.
#[inline(always)]
fn turn_into_last(ctx: &TcContext, work: &mut Work) -> Result<(), DropReason> {
    for index in 1..HELD_PER_PACKET {
        work.fragment.index = index;
        if maps::held(&work.fragment).is_none() {
            work.fragment.index = index - 1;
            break;
        }
    }
    // gone since: the first begins anew without it
    let Some(held) = maps::held(&work.fragment) else { return Ok(()) };
    let length = bounded(held.length as usize).filter(|_| maps::is_waited_for(held.came));
    let Some(length) = length else {
        maps::let_go(&work.fragment);
        return Ok(());
    };
    // no room in the device's queue: the first begins anew without it, too
    if skb::clone_to_ingress(ctx, ctx.ifindex()).is_err() {
        maps::let_go(&work.fragment);
        return Ok(());
    }
    skb::set_length(ctx, L3 + length)?;
    // asked again: what the verifier of Linux 5.10 knows of a number is lost where that is put aside
    let Some(length) = bounded(held.length as usize) else { return Err(DropReason::FragmentOvertaken) };
    skb::store(ctx, L3, &held.bytes, length)?;
    // somebody else's by now: half of it may be another fragment
    if maps::let_go(&work.fragment) { Ok(()) } else { Err(DropReason::FragmentOvertaken) }
}
