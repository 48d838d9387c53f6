//! Fragments that arrive before the first one, which alone has the ports.
//!
//! A BPF program cannot delay a packet. So the bytes of an early fragment are stored in
//! `REORDER_FRAGMENTS` and its frame is dropped. When the first fragment arrives, its frame is
//! cloned to the ingress of the same device, and the original frame is overwritten with a stored
//! fragment and redirected there behind the clone. Both then pass the hook in order. With more
//! fragments stored, the first one meets the next when it passes again.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_REDIRECT},
    programs::TcContext,
};
use dataplane_common::reason::{DropReason, HookId, Verdict};

use crate::{
    frame::{Frame, L3},
    global,
    helpers::{opaque, skb, time},
    maps::{self, MAX_BUFFERED_BYTES},
    scratch::Scratch,
};

/// Fragments stored of one packet: 64 KiB in fragments of 1,400 bytes.
const MAX_BUFFERED_PER_PACKET: u32 = 48;

/// Whether a hook stores early fragments: those where frames arrive, and can be redirected to once
/// more.
#[inline(always)]
pub(crate) const fn is_enabled(hook: HookId) -> bool {
    matches!(hook, HookId::FromPod | HookId::FromWire | HookId::FromOverlay)
}

/// Handles a later fragment (`scratch.reorder.key`) whose first has not been seen.
#[inline(always)]
pub(crate) fn buffer_early_fragment(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
    if global::call(scratch, || buffer_fragment(ctx.skb.skb)).unpack()? {
        Ok(Verdict::FragmentHeld)
    } else {
        redirect_to_own_ingress(ctx)
    }
}

/// Handles a first fragment (`scratch.reorder.key`) for which early ones are stored.
#[inline(always)]
pub(crate) fn replay_early_fragment(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
    global::call(scratch, || replay_fragment(ctx.skb.skb)).unpack()?;
    redirect_to_own_ingress(ctx)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn buffer_fragment(skb: *mut __sk_buff) -> u32 {
    global::run(skb, try_buffer)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn replay_fragment(skb: *mut __sk_buff) -> u32 {
    global::run(skb, clone_and_overwrite)
}

#[inline(always)]
fn redirect_to_own_ingress(ctx: &TcContext) -> Result<Verdict, DropReason> {
    match skb::redirect_ingress(ctx.ifindex()) {
        TC_ACT_REDIRECT => Ok(Verdict::FragmentAgain),
        _ => Err(DropReason::FragmentOvertaken),
    }
}

/// The length, if it is 1 to `MAX_BUFFERED_BYTES`. The verifier of Linux 5.10 learns nothing from
/// "not 0", but does from this comparison.
#[inline(always)]
fn bounded(length: usize) -> Option<usize> {
    let last = opaque((length as u64).wrapping_sub(1));
    (last < MAX_BUFFERED_BYTES as u64).then_some(last as usize + 1)
}

/// Stores the fragment. False if its first has arrived meanwhile.
#[inline(always)]
fn try_buffer(ctx: &TcContext, scratch: &mut Scratch) -> Result<bool, DropReason> {
    let Some(buffer) = maps::reorder_buffer() else { return Err(DropReason::FragmentUnknown) };
    let length = (ctx.length() as usize).wrapping_sub(L3);
    let Some(length) = bounded(length) else { return Err(DropReason::FragmentUnknown) };
    skb::load(ctx, L3, &mut buffer.bytes, length)?;
    buffer.length = length as u32;
    buffer.received_at = time::now();
    for index in 0..MAX_BUFFERED_PER_PACKET {
        scratch.reorder.key.index = index;
        let key = &scratch.reorder.key;
        if maps::buffered_fragment(key).is_none() && maps::buffer_fragment(key, buffer) {
            // on another CPU the first fragment publishes its ports and then looks for stored
            // fragments; this one is stored and then looks for the ports: at least one of the two
            // sees the other
            let is_first_missing = maps::fragmented_packet(&key.packet).is_none();
            return Ok(is_first_missing || !maps::remove_buffered_fragment(key));
        }
    }
    Err(DropReason::FragmentUnknown)
}

/// Clones the first fragment, and overwrites its frame with the stored fragment of the highest
/// index.
#[inline(always)]
fn clone_and_overwrite(ctx: &TcContext, scratch: &mut Scratch) -> Result<(), DropReason> {
    for index in 1..MAX_BUFFERED_PER_PACKET {
        scratch.reorder.key.index = index;
        if maps::buffered_fragment(&scratch.reorder.key).is_none() {
            scratch.reorder.key.index = index - 1;
            break;
        }
    }
    let key = &scratch.reorder.key;
    // gone since: only the first fragment is redirected
    let Some(buffered) = maps::buffered_fragment(key) else { return Ok(()) };
    let length =
        bounded(buffered.length as usize).filter(|_| maps::within_fragment_timeout(buffered.received_at));
    let Some(length) = length else {
        maps::remove_buffered_fragment(key);
        return Ok(());
    };
    // the backlog is full: only the first fragment is redirected, here too
    if skb::clone_to_ingress(ctx, ctx.ifindex()).is_err() {
        maps::remove_buffered_fragment(key);
        return Ok(());
    }
    skb::set_len(ctx, L3 + length)?;
    // checked again, because the verifier of Linux 5.10 forgets the bounds of a number that it
    // spills to the stack
    let Some(length) = bounded(buffered.length as usize) else { return Err(DropReason::FragmentOvertaken) };
    skb::store(ctx, L3, &buffered.bytes, length)?;
    // removed by another CPU meanwhile: the entry may have been re-used while it was copied
    if maps::remove_buffered_fragment(key) { Ok(()) } else { Err(DropReason::FragmentOvertaken) }
}
