//! Finds a slot of `FLOWS` for a new flow: free, or of a flow that may be given up for it.
//!
//! A CPU takes slots from a block of 64. When that has no more, it takes the next block that no
//! other CPU has: a clock hand goes round the table, and a flow is looked at again after all
//! others. What an examination of a block shows is kept in `FLOW_BLOCKS`. A block is examined at
//! most once a second, or after its last known slot of a class has been taken. So a new flow costs
//! the examination of about one slot, in a full table, too.

use dataplane_common::{
    abi::{FlowBlock, FlowRef},
    flow::SlotClass,
};

use super::{epoch, set_epoch};
use crate::{
    config,
    helpers::{opaque, time},
    maps,
};

/// No slot.
pub(super) const NONE: u32 = u32::MAX;
/// [`look`] has found nothing in the blocks that it looked at.
const NOTHING: u32 = NONE - 1;
/// [`look`] has come to a block that is due.
const IS_DUE: u32 = NONE - 2;
/// Blocks of which one call of [`look`] reads the hints.
const BLOCKS_AT_ONCE: u32 = 16;
/// Calls of [`look`] for one flow and class: a bound for the verifier. Every second one at most
/// leads to the examination of blocks.
const MAX_LOOKS: u32 = 64;
/// Blocks that one call of [`examine_blocks`] examines at most.
const EXAMINED_AT_ONCE: u32 = 16;

/// Takes a slot: its record is incomplete, nothing leads to it, and its block is claimed until
/// [`give_back`]. [`NONE`] if there is none for a flow from there.
#[inline(always)]
pub(super) fn take(from_outside: bool) -> u32 {
    let last = if from_outside { SlotClass::Idle } else { SlotClass::UnconfirmedInside };
    for class in 0..FlowBlock::CLASSES {
        if class > last as u32 {
            break;
        }
        let slot = find_slot(class);
        if slot != NONE {
            return slot;
        }
    }
    NONE
}

/// Takes a slot of a class.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_slot(class: u32) -> u32 {
    let Some(search) = search_of(class) else { return NONE };
    // SAFETY: this CPU's own value, which lives as long as the map.
    let (due, seen) = unsafe { (&mut *search.due, search.seen) };
    if *due > time::now() {
        return NONE;
    }
    for _ in 0..MAX_LOOKS {
        let slot = look(class);
        if slot < IS_DUE {
            // SAFETY: as above.
            unsafe { seen.write_volatile(0) };
            return slot;
        }
        if slot == IS_DUE {
            examine_blocks(class);
        } else if slot == NOTHING {
            // SAFETY: as above.
            let blocks = unsafe { seen.read_volatile() };
            let is_round = blocks >= FlowBlock::count(config::flow_slots());
            // SAFETY: as above.
            unsafe { seen.write_volatile(if is_round { 0 } else { blocks + BLOCKS_AT_ONCE }) };
            if is_round {
                *due = time::now() + 1;
                return NONE;
            }
        }
    }
    NONE
}

/// This CPU's search for slots of a class.
struct Search {
    block: *mut u32,
    due: *mut u32,
    seen: *mut u32,
}

#[inline(always)]
fn search_of(class: u32) -> Option<Search> {
    let search = maps::flow_search()?;
    let index = index_of(class);
    // SAFETY: this CPU's own value, which lives as long as the map.
    unsafe {
        Some(Search {
            block: &raw mut (*search).blocks[index],
            due: &raw mut (*search).due[index],
            seen: &raw mut (*search).seen[index],
        })
    }
}

/// Masked, because the verifier wants to see that it is in bounds.
#[inline(always)]
const fn index_of(class: u32) -> usize {
    class as usize & (FlowBlock::CLASSES as usize - 1)
}

/// Looks at some blocks for a slot of the class, the CPU's own first, and takes it. [`NOTHING`] if
/// their hints know of none; [`NONE`] if another CPU has it, or takes one of that block; [`IS_DUE`]
/// if the CPU's own block is to be examined first.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn look(class: u32) -> u32 {
    let Some(search) = search_of(class) else { return NONE };
    // SAFETY: this CPU's own value, which lives as long as the map.
    let own = unsafe { &mut *search.block };
    if *own == 0 {
        take_next_block(own, class);
    }
    let now = time::now();
    let mut outcome = NOTHING;
    for _ in 0..BLOCKS_AT_ONCE {
        let number = own.wrapping_sub(1);
        let Some(row) = maps::flow_block(number) else { return NOTHING };
        // SAFETY: array values live as long as the map. CPUs may race for the hints; what is lost
        // is found again.
        let block = unsafe { &mut *row };
        let slots = &raw mut block.slots[index_of(class)];
        // SAFETY: a live field.
        let known = unsafe { slots.read_volatile() };
        if known == 0 && block.due <= now {
            return IS_DUE;
        }
        let next = &mut block.next[index_of(class)];
        let ahead = known & (u64::MAX << (*next & 63));
        if ahead != 0 && !maps::claim_flow_block(row) {
            // another CPU takes one of its slots
            outcome = NONE;
        } else if ahead != 0 {
            let place = ahead.trailing_zeros();
            let slot = number * FlowBlock::SLOTS + place;
            *next = place as u8 + 1;
            // SAFETY: a live field.
            unsafe { slots.write_volatile(known & !(1 << (place & 63))) };
            if ahead & !(1 << (place & 63)) == 0 {
                block.due = now;
                go_on(own, class, next);
            }
            let taken = take_slot(slot, class, now);
            if taken == NONE {
                maps::release_flow_block(row);
            }
            return taken;
        }
        go_on(own, class, next);
    }
    outcome
}

/// Leaves the CPU's block for the next one.
#[inline(always)]
fn go_on(own: &mut u32, class: u32, next: &mut u8) {
    *next = 0;
    take_next_block(own, class);
}

#[inline(always)]
fn take_next_block(own: &mut u32, class: u32) {
    *own = maps::next_flow_block(class, FlowBlock::count(config::flow_slots())) + 1;
}

/// Examines blocks, the CPU's own first, until one has a slot of the class.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn examine_blocks(class: u32) -> u32 {
    let Some(search) = search_of(class) else { return 0 };
    // SAFETY: this CPU's own value, which lives as long as the map.
    let own = unsafe { &mut *search.block };
    for _ in 0..EXAMINED_AT_ONCE {
        if examine_block(own.wrapping_sub(1)) >> (class & 31) & 1 != 0 {
            return 1;
        }
        take_next_block(own, class);
    }
    0
}

/// Renews the hints of a block. Returns the classes of which it has slots, a bit each.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn examine_block(number: u32) -> u32 {
    let Some(block) = maps::flow_block(number) else { return 0 };
    // SAFETY: as in `look`.
    let block = unsafe { &mut *block };
    let now = time::now();
    let mut slots = [0_u64; FlowBlock::CLASSES as usize];
    for place in 0..FlowBlock::SLOTS {
        let class = classify_slot(number * FlowBlock::SLOTS + place, now);
        // by arithmetic: the verifier would follow each class through all slots behind it
        for (candidate, slots) in slots.iter_mut().enumerate() {
            *slots |= is_equal(class, candidate as u32) << place;
        }
    }
    block.slots = slots;
    block.due = now + 1;
    let mut classes = 0;
    for (class, slots) in slots.iter().enumerate() {
        classes |= u32::from(*slots != 0) << class;
    }
    classes
}

/// 1 if the numbers are equal, else 0.
#[inline(always)]
fn is_equal(one: u32, other: u32) -> u64 {
    opaque(u64::from(one ^ other).wrapping_sub(1)) >> 63
}

/// The class of a slot, as a number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn classify_slot(slot: u32, now: u32) -> u32 {
    let Some(flow) = maps::flow(slot) else { return SlotClass::Kept as u32 };
    // SAFETY: array values live as long as the map; a torn read gives a wrong hint at worst.
    SlotClass::of(unsafe { &*flow }, now) as u32
}

/// Takes the slot, whose block is claimed, if it still is of the class, or of a readier one; else
/// [`NONE`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_slot(slot: u32, class: u32, now: u32) -> u32 {
    if classify_slot(slot, now) > class {
        return NONE;
    }
    let Some(flow) = maps::flow(slot) else { return NONE };
    // SAFETY: array values live as long as the map, and the slot's block is claimed.
    let flow = unsafe { &mut *flow };
    let reference = FlowRef { slot, epoch: epoch(flow) };
    // odd: a reader with a reference sees a mismatch
    set_epoch(flow, reference.epoch | 1);
    if reference.epoch != 0 {
        maps::remove_flow_key(&flow.forward, reference);
        maps::remove_flow_key(&flow.reply, reference);
    }
    slot
}

/// Ends the taking of a slot: its record is complete.
#[inline(always)]
pub(super) fn give_back(slot: u32) {
    if let Some(block) = maps::flow_block(slot / FlowBlock::SLOTS) {
        maps::release_flow_block(block);
    }
}
