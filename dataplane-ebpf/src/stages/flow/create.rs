//! Creates flows: claims the tuples of both directions, and a port of the node if the source is
//! translated.

use dataplane_common::{
    abi::{Flow, FlowFlags, FlowKey, FlowRef, Port},
    flow::{Need, SlotClass, State, tuple_reusable},
    hash,
    reason::DropReason,
};

use super::{epoch, kind_of, kinds, lookup, reverse, set_epoch, slot};
use crate::{
    config,
    global::{self, PackedResult},
    helpers::{random, time},
    maps,
    scratch::{self, NewFlow, NextHopSearch, Scratch},
    stages::parse::Transport,
};

/// Ports of which one call of [`claim_ports`] tries each.
const PORTS_AT_ONCE: u32 = 16;
/// Calls for one flow, in groups. Which ports each group takes besides free ones: [`need_of`].
const PORT_CALLS: u32 = 80;
const FREE_CALLS: u32 = 8;
const GROUP_CALLS: u32 = 4;

/// How far a call for ports goes. First a hundred ports, of which one is free unless the range is
/// almost exhausted; then those that others need less and less; then a thousand more, for the last
/// one that is free among connections that go on.
#[inline(always)]
const fn need_of(call: u32) -> Option<Need> {
    match call.wrapping_sub(FREE_CALLS) / GROUP_CALLS {
        group @ 0..=3 => Some(Need::from_number(group)),
        _ => None,
    }
}

/// Distances between the ports that a flow tries: primes, so that they reach every port of a range
/// whose size has none of them as a factor.
const STRIDES: [u16; 8] = [257, 263, 269, 271, 277, 281, 283, 293];

/// Creates the flow of packets with tuple `scratch.tuple`, as `scratch.new_flow` says, and writes
/// the tuple they leave with to `scratch.nat_tuple`. If another CPU creates a flow of the same
/// tuple at the same time, one of the two is used by both.
///
/// If the source is to be translated, or if another flow has the reply tuple already, the source
/// port becomes one of the node's range (`snat_ports`), so that the reply tuple is unique. It also
/// does if `prefers_range_port` says so, and the range has a free one.
///
/// # Errors
/// [`DropReason::FlowTableFull`], [`DropReason::PortsExhausted`].
#[inline(always)]
pub(crate) fn create(scratch: &mut Scratch) -> Result<(), DropReason> {
    if try_create(scratch)? {
        return Ok(());
    }
    // another CPU has been faster: its flow is of this packet's connection, or has ended again
    let forward_kinds = kinds_of(scratch.new_flow.flags);
    if lookup(scratch, forward_kinds) || try_create(scratch)? {
        Ok(())
    } else {
        Err(DropReason::FlowTableFull)
    }
}

/// False if the tuple has a flow but for the one to be replaced.
#[inline(always)]
fn try_create(scratch: &mut Scratch) -> Result<bool, DropReason> {
    let slot = slot::take(scratch.frontend_query.from_outside != 0);
    if slot == slot::NONE {
        return Err(DropReason::FlowTableFull);
    }
    // not before there is a slot: without one, both directions stay with the flow
    if scratch.new_flow.replaced_epoch != 0 {
        let _removed = global::call(scratch, || remove_replaced_key());
    }
    scratch.new_flow.slot = slot;
    let result = global::call(scratch, || create_flow());
    slot::give_back(slot);
    result.unpack()
}

/// The kinds of a flow with these [`FlowFlags`], and how its packet has come.
#[inline(always)]
const fn kinds_of(flags: u32) -> u32 {
    kind_of(flags) | if flags & FlowFlags::STACK == 0 { 0 } else { kinds::VIA_STACK }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn remove_replaced_key() -> u32 {
    let Some(scratch) = scratch::current() else { return 0 };
    let NewFlow { replaced_slot: slot, replaced_epoch: epoch, .. } = scratch.new_flow;
    maps::remove_flow_key(&scratch.tuple, FlowRef { slot, epoch });
    0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn create_flow() -> u32 {
    let Some(scratch) = scratch::current() else { return DropReason::WriteFailed.number().into() };
    PackedResult::from(fill_slot(scratch)).raw()
}

#[inline(always)]
fn fill_slot(scratch: &mut Scratch) -> Result<bool, DropReason> {
    let slot = scratch.new_flow.slot;
    let Some(flow) = maps::flow(slot) else { return Err(DropReason::FlowTableFull) };
    // SAFETY: array values live as long as the map, and the slot is taken.
    let flow = unsafe { &mut *flow };
    // even: `slot::take_slot` made it odd
    let reference = FlowRef { slot, epoch: epoch(flow).wrapping_add(1) };
    scratch.new_flow.epoch = reference.epoch;
    if let Err(reason) = claim_reply_tuple(scratch) {
        leave_free(flow, reference);
        return Err(reason);
    }
    let now = time::now();
    flow.forward = scratch.tuple;
    flow.reply = scratch.new_flow.reply_tuple;
    flow.backend_id = scratch.new_flow.backend_id;
    flow.backend_generation = scratch.new_flow.backend_generation;
    flow.service_id = scratch.new_flow.service_id;
    flow.last_seen = now;
    flow.created = now;
    flow.state = State::HalfOpen as u32;
    if scratch.frontend_query.from_outside != 0 {
        scratch.new_flow.flags |= FlowFlags::OUTSIDE;
    }
    flow.flags = scratch.new_flow.flags;
    scratch.nat.flow_flags = scratch.new_flow.flags;
    set_epoch(flow, reference.epoch);
    // the map update is a barrier: a reader that finds the key finds the record complete
    if !maps::claim_flow_key(&scratch.tuple, reference) {
        let _done = global::call(scratch, || give_back_reply());
        leave_free(flow, reference);
        return Ok(false);
    }
    let reply = &scratch.new_flow.reply_tuple;
    maps::mark_may_have_flows(&reply.dst, reply.protocol, reply.dst_port);
    scratch.next_hop.entry = NextHopSearch::NONE;
    reverse(&scratch.new_flow.reply_tuple, &mut scratch.nat_tuple);
    Ok(true)
}

/// Leaves the slot for another flow.
#[inline(always)]
fn leave_free(flow: &mut Flow, reference: FlowRef) {
    flow.state = State::HalfOpen as u32;
    flow.last_seen = 0;
    set_epoch(flow, reference.epoch);
}

/// Claims a unique tuple for the replies, with the source as it is or translated.
#[inline(always)]
fn claim_reply_tuple(scratch: &mut Scratch) -> Result<(), DropReason> {
    let is_direct = scratch.new_flow.flags & FlowFlags::DIRECT != 0;
    let may_keep_source = scratch.new_flow.snat_source.is_zero();
    let prefers_range_port = may_keep_source && scratch.new_flow.prefers_range_port != 0;
    if is_direct || (may_keep_source && !prefers_range_port && claim_reply(scratch, Need::Little)) {
        return Ok(());
    }
    // the tuple belongs to a flow already, which knows what happens to answers
    if scratch.new_flow.flags & FlowFlags::INBOUND != 0 {
        return Err(DropReason::FlowTableFull);
    }
    if !may_keep_source {
        scratch.new_flow.reply_tuple.dst = scratch.new_flow.snat_source;
    }
    scratch.new_flow.flags |= FlowFlags::SOURCE;
    if claim_reply_port(scratch) {
        return Ok(());
    }
    scratch.new_flow.reply_tuple.dst_port = scratch.tuple.src_port;
    if prefers_range_port && claim_reply(scratch, Need::Little) {
        Ok(())
    } else {
        Err(DropReason::PortsExhausted)
    }
}

/// Finds a port of the node's range that makes the reply tuple unique, and claims that tuple.
#[inline(always)]
fn claim_reply_port(scratch: &mut Scratch) -> bool {
    // a protocol without ports has one reply tuple per pair of addresses
    if scratch.transport & (Transport::PORTS | Transport::ECHO) == 0 {
        return claim_reply(scratch, Need::Last);
    }
    let random = random::random();
    let (_, count) = config::snat_ports();
    scratch.new_flow.port = hash::scale(random, count);
    // the lowest bits hardly count in `hash::scale`
    scratch.new_flow.stride = u32::from(STRIDES[random as usize % STRIDES.len()]);
    for call in 0..PORT_CALLS {
        if matches!(global::call(scratch, || claim_ports(call)).unpack(), Ok(true)) {
            return true;
        }
    }
    false
}

/// Claims the reply tuple with one of the next ports.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn claim_ports(call: u32) -> u32 {
    let Some(scratch) = scratch::current() else { return 0 };
    let (first, count) = config::snat_ports();
    for _ in 0..PORTS_AT_ONCE {
        scratch.new_flow.port = scratch.new_flow.port.wrapping_add(scratch.new_flow.stride) % count;
        let port = Port::new(first.wrapping_add(scratch.new_flow.port as u16));
        scratch.new_flow.reply_tuple.dst_port = port;
        if scratch.transport & Transport::ECHO != 0 {
            scratch.new_flow.reply_tuple.src_port = port;
        }
        let claimed = match need_of(call) {
            None => claim_free_reply(scratch),
            Some(need) => claim_reply(scratch, need),
        };
        if claimed {
            return 1;
        }
    }
    0
}

#[inline(always)]
fn claim_free_reply(scratch: &Scratch) -> bool {
    let new_flow = &scratch.new_flow;
    maps::claim_flow_key(&new_flow.reply_tuple, FlowRef { slot: new_flow.slot, epoch: new_flow.epoch })
}

/// Claims the reply tuple if it is free, left over from an earlier flow of the same connection, or
/// of one that needs it less ([`tuple_reusable`]).
#[inline(always)]
fn claim_reply(scratch: &mut Scratch, need: Need) -> bool {
    if claim_free_reply(scratch) {
        return true;
    }
    // of two CPUs that release it, one gets it
    let released = global::call(scratch, || release_reply_key(need as u32)).unpack();
    matches!(released, Ok(true)) && claim_free_reply(scratch)
}

/// Removes the flow that has the reply tuple, if it needs it less. True if the tuple is free then.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn release_reply_key(need: u32) -> u32 {
    let Some(scratch) = scratch::current() else { return 0 };
    u32::from(try_release(scratch, need))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_tuple_reusable(slot: u32, need: u32, from_outside: u32) -> u32 {
    let Some(flow) = maps::flow(slot) else { return 0 };
    // SAFETY: as in `try_release`.
    let flow = unsafe { &*flow };
    let now = time::now();
    let class = SlotClass::of(flow, now);
    u32::from(tuple_reusable(flow, class, now, Need::from_number(need), from_outside != 0))
}

#[inline(always)]
fn try_release(scratch: &Scratch, need: u32) -> bool {
    let Some(holder) = maps::flow_ref(&scratch.new_flow.reply_tuple) else { return true };
    let Some(flow) = maps::flow(holder.slot) else { return false };
    // SAFETY: as in `try_lookup`; read only, and a torn read at worst costs another port.
    let flow = unsafe { &*flow };
    // another CPU has just claimed it and is still writing the record
    if epoch(flow).wrapping_add(1) == holder.epoch {
        return false;
    }
    if epoch(flow) == holder.epoch && flow.forward != scratch.tuple {
        if is_tuple_reusable(holder.slot, need, scratch.frontend_query.from_outside) == 0 {
            return false;
        }
        // both directions: a later packet of its client is a new connection
        maps::remove_flow_key(&flow.forward, holder);
    }
    maps::remove_flow_key(&scratch.new_flow.reply_tuple, holder);
    true
}

/// Gives up the reply tuple of a flow that is not to be, if it has it. If the flow that is there
/// has the same, it may have lost it to this one ([`release_reply_key`]).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn give_back_reply() -> u32 {
    let Some(scratch) = scratch::current() else { return 0 };
    let reply_tuple = &scratch.new_flow.reply_tuple;
    let reference = FlowRef { slot: scratch.new_flow.slot, epoch: scratch.new_flow.epoch };
    if maps::flow_ref(reply_tuple) != Some(reference) {
        return 0;
    }
    let other = maps::flow_ref(&scratch.tuple).unwrap_or(reference);
    if other != reference && is_reply_of(reply_tuple, other.slot) {
        // on failure the index is full, and the connection's answers are lost until it ends
        let _best_effort = maps::set_flow_key(reply_tuple, other);
    } else {
        maps::remove_flow_key(reply_tuple, reference);
    }
    0
}

#[inline(always)]
fn is_reply_of(tuple: &FlowKey, slot: u32) -> bool {
    maps::flow(slot).is_some_and(|flow| {
        // SAFETY: as in `try_release`.
        unsafe { (*flow).reply == *tuple && (*flow).flags & FlowFlags::DIRECT == 0 }
    })
}
