//! Flows: connection tracking of connections that are translated per packet. Looks flows up,
//! creates and reclaims them.
//!
//! Layout and invariants of the tables are in `dataplane_common::abi::flow`, timeouts and states in
//! `dataplane_common::flow`. TCP sequence numbers play no part, and no map evicts entries by
//! itself.

use dataplane_common::{
    abi::{Flow, FlowFlags, FlowKey, FlowRef, Port},
    flow::{Direction, State, is_absent, is_evictable, tcp_flags, tuple_reusable},
    hash,
    reason::DropReason,
};

use super::parse::Transport;
use crate::{
    config,
    global::{self, PackedResult},
    helpers::{random, time},
    maps,
    scratch::{self, Scratch},
};

/// Random source ports of which only free ones are taken, before [`REUSED_PORT_TRIES`].
const PORT_TRIES: u32 = 32;
/// Random source ports that are also taken from closed or expired connections, before the packet is
/// dropped.
const REUSED_PORT_TRIES: u32 = 6;
/// Slots examined before the table counts as full: a bound for the verifier. The node's
/// configuration may lower it.
const MAX_PROBES: u32 = 8;

/// Kinds of flows, a bit each.
pub(crate) mod kinds {
    /// To a backend of a service.
    pub(crate) const SERVICE: u32 = 1;
    /// Masqueraded.
    pub(crate) const MASQUERADE: u32 = 2;
    /// Every kind.
    pub(crate) const ANY: u32 = SERVICE | MASQUERADE;
    /// With [`MASQUERADE`]: the packet has taken the kernel's stack.
    pub(crate) const VIA_STACK: u32 = 4;
}

/// Whether `forward_kinds` include the flow with these [`FlowFlags`].
#[inline(always)]
const fn translates_forward(flags: u32, forward_kinds: u32) -> bool {
    let kind = if flags & FlowFlags::SERVICE != 0 { kinds::SERVICE } else { kinds::MASQUERADE };
    forward_kinds & kind != 0
}

/// Looks up the flow of the packet with tuple `scratch.tuple`. True on a hit: then
/// `scratch.nat_tuple` is the tuple it leaves with, and the flow's state includes this packet.
/// Forward packets hit only flows of `forward_kinds`.
#[inline(always)]
pub(crate) fn lookup(scratch: &mut Scratch, forward_kinds: u32) -> bool {
    matches!(global::call(scratch, || find_flow(forward_kinds)).unpack(), Ok(true))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_flow(forward_kinds: u32) -> u32 {
    scratch::current().map_or(0, |scratch| u32::from(try_lookup(scratch, forward_kinds)))
}

#[inline(always)]
fn try_lookup(scratch: &mut Scratch, forward_kinds: u32) -> bool {
    let Some(reference) = maps::flow_ref(&scratch.tuple) else { return false };
    let Some(flow) = maps::flow(reference.slot) else { return false };
    // SAFETY: array values live as long as the map. Another CPU may give the record to a new flow
    // meanwhile; the epoch, read again below, tells.
    let flow = unsafe { &mut *flow };
    let now = time::now();
    if epoch(flow) != reference.epoch || is_absent(flow, now) {
        return false;
    }
    let transport = scratch.transport;
    let tcp = transport as u8;
    let direction = if flow.forward == scratch.tuple { Direction::Forward } else { Direction::Reply };
    match direction {
        Direction::Forward
            if !translates_forward(flow.flags, forward_kinds) || must_reselect(flow, transport) =>
        {
            return false;
        }
        Direction::Forward => reverse(&flow.reply, &mut scratch.nat_tuple),
        // its identifier is the sender's own
        Direction::Reply if transport & Transport::ECHO_REQUEST != 0 => return false,
        Direction::Reply if is_to_direct_connection(flow, tcp) => {
            maps::remove_flow_key(&scratch.tuple, reference);
            return false;
        }
        Direction::Reply => reverse(&flow.forward, &mut scratch.nat_tuple),
    }
    if epoch(flow) != reference.epoch {
        return false;
    }
    if direction == Direction::Forward {
        follow_stack(flow, forward_kinds);
    }
    scratch.nat.flow_flags = flow.flags;
    let is_first_this_second = if scratch.nat.is_direct() {
        record_direct_packet(flow, tcp, now)
    } else {
        record_packet(flow, direction, tcp, now)
    };
    // a row of that address added since the flow was created does not have the hint
    if is_first_this_second && direction == Direction::Forward {
        maps::mark_may_have_flows(&scratch.nat_tuple.src, scratch.tuple.protocol);
    }
    true
}

/// Lets the answers take the way of the pod's packet, by the stack or past it.
#[inline(always)]
fn follow_stack(flow: &mut Flow, forward_kinds: u32) {
    let via_stack = if forward_kinds & kinds::VIA_STACK == 0 { 0 } else { FlowFlags::STACK };
    let flags = flow.flags & !FlowFlags::STACK | via_stack;
    if flags != flow.flags {
        flow.flags = flags;
    }
}

/// As [`record_packet`], for direct server return, where replies bypass this node: an ACK shows
/// that there was one, and a FIN closes the connection in both directions.
#[inline(always)]
fn record_direct_packet(flow: &mut Flow, tcp: u8, now: u32) -> bool {
    let is_reply_seen = tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK;
    let direction = if is_reply_seen { Direction::Reply } else { Direction::Forward };
    let closes = if tcp & tcp_flags::FIN == 0 { 0 } else { tcp_flags::RST };
    record_packet(flow, direction, tcp | closes, now)
}

/// As [`lookup`], without updating the flow: for ICMP errors.
#[inline(always)]
pub(crate) fn lookup_without_update(scratch: &mut Scratch, forward_kinds: u32) -> bool {
    let Some(reference) = maps::flow_ref(&scratch.tuple) else { return false };
    let Some(flow) = maps::flow(reference.slot) else { return false };
    // SAFETY: as in `try_lookup`.
    let flow = unsafe { &*flow };
    if is_absent(flow, time::now()) {
        return false;
    }
    let opposite = if flow.forward == scratch.tuple {
        if !translates_forward(flow.flags, forward_kinds) {
            return false;
        }
        &flow.reply
    } else {
        &flow.forward
    };
    scratch.nat.flow_flags = flow.flags;
    reverse(opposite, &mut scratch.nat_tuple);
    epoch(flow) == reference.epoch
}

/// Writes the tuple of the opposite direction to `into`; in place, because a tuple is too large for
/// the BPF stack.
#[inline(always)]
fn reverse(tuple: &FlowKey, into: &mut FlowKey) {
    into.src = tuple.dst;
    into.dst = tuple.src;
    into.src_port = tuple.dst_port;
    into.dst_port = tuple.src_port;
    into.protocol = tuple.protocol;
}

/// Whether a forward packet must select a backend again although its tuple has a flow: the backend
/// has been removed, or a new connection re-uses the ports of one that has ended.
#[inline(always)]
fn must_reselect(flow: &Flow, transport: u32) -> bool {
    let is_syn = tcp_flags::is_initial_syn(transport as u8);
    let state = State::from_number(flow.state);
    // direct server return: nodes that disagree on the backend send the packet back and forth until
    // one selects again
    let is_disputed = flow.flags & FlowFlags::DIRECT != 0 && state == State::HalfOpen;
    if is_syn && (state.is_ending() || is_disputed) {
        return true;
    }
    // TCP and SCTP keep their backend until one side closes: a terminating pod drains its
    // connections
    let may_change_backend = transport & Transport::HANDSHAKE == 0 || is_syn;
    may_change_backend
        && flow.flags & FlowFlags::SERVICE != 0
        && maps::backend_generation(flow.backend_id) != flow.backend_generation
}

/// Whether a reply belongs to a connection that the client has since made directly to the backend,
/// from the same port: a SYN through this flow would have replaced the flow.
#[inline(always)]
fn is_to_direct_connection(flow: &Flow, tcp: u8) -> bool {
    let syn_ack = tcp_flags::SYN | tcp_flags::ACK;
    tcp & syn_ack == syn_ack
        && flow.flags & FlowFlags::SOURCE == 0
        && State::from_number(flow.state).is_ending()
}

/// Updates state and last-seen time; writes them only if they change, so that CPUs share the cache
/// line of a busy flow. True for the first packet of a second.
#[inline(always)]
fn record_packet(flow: &mut Flow, direction: Direction, tcp: u8, now: u32) -> bool {
    let is_first_this_second = flow.last_seen != now;
    if is_first_this_second {
        flow.last_seen = now;
    }
    let state = State::next_raw(flow.state, direction, tcp);
    if flow.state != state {
        flow.state = state;
    }
    is_first_this_second
}

/// Creates the flow of packets with tuple `scratch.tuple`, as `scratch.new_flow` says, and writes
/// the tuple they leave with to `scratch.nat_tuple`.
///
/// If the source is to be translated, or if another flow has the reply tuple already, the source
/// port becomes one of the node's range (`snat_ports`), so that the reply tuple is unique. It also
/// does if `prefers_range_port` says so, and the range has a free one.
///
/// # Errors
/// [`DropReason::FlowTableFull`], [`DropReason::PortsExhausted`].
#[inline(always)]
pub(crate) fn create(scratch: &mut Scratch) -> Result<(), DropReason> {
    global::call(scratch, || create_flow()).unpack().map(|_| ())
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn create_flow() -> u32 {
    let Some(scratch) = scratch::current() else { return DropReason::WriteFailed.number().into() };
    PackedResult::from(try_create(scratch)).raw()
}

#[inline(always)]
fn try_create(scratch: &mut Scratch) -> Result<(), DropReason> {
    let slot = reclaim_slot();
    let Some(flow) = maps::flow(slot) else { return Err(DropReason::FlowTableFull) };
    // SAFETY: array values live as long as the map, and the holder of a slot owns the record.
    let flow = unsafe { &mut *flow };
    let reference = FlowRef { slot, epoch: flow.epoch.wrapping_add(2) };
    // odd: a reader with an older reference sees a mismatch
    set_epoch(flow, flow.epoch | 1);

    let is_direct = scratch.new_flow.flags & FlowFlags::DIRECT != 0;
    let may_keep_source = scratch.new_flow.snat_source.is_zero();
    let prefers_range_port = may_keep_source && scratch.new_flow.prefers_range_port != 0;
    let keeps_source =
        is_direct || (may_keep_source && !prefers_range_port && claim_reply(scratch, reference, false));
    if !keeps_source {
        // the tuple belongs to a flow already, which knows what happens to answers
        if scratch.new_flow.flags & FlowFlags::INBOUND != 0 {
            set_epoch(flow, reference.epoch);
            maps::put_flow_slot(slot);
            return Err(DropReason::FlowTableFull);
        }
        if !may_keep_source {
            scratch.new_flow.reply_tuple.dst = scratch.new_flow.snat_source;
        }
        scratch.new_flow.flags |= FlowFlags::SOURCE;
        let claimed = claim_reply_port(scratch, reference) || {
            scratch.new_flow.reply_tuple.dst_port = scratch.tuple.src_port;
            prefers_range_port && claim_reply(scratch, reference, false)
        };
        if !claimed {
            set_epoch(flow, reference.epoch);
            maps::put_flow_slot(slot);
            return Err(DropReason::PortsExhausted);
        }
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
    flow.flags = scratch.new_flow.flags;
    scratch.nat.flow_flags = scratch.new_flow.flags;
    set_epoch(flow, reference.epoch);
    // the map update is a barrier: a reader that finds the key finds the record complete
    let indexed = maps::set_flow_key(&scratch.tuple, reference);
    maps::put_flow_slot(slot);
    if !indexed {
        return Err(DropReason::FlowTableFull);
    }
    maps::mark_may_have_flows(&scratch.new_flow.reply_tuple.dst, scratch.tuple.protocol);
    reverse(&scratch.new_flow.reply_tuple, &mut scratch.nat_tuple);
    Ok(())
}

/// Takes a slot whose flow is evictable, and removes that flow's index entries. `u32::MAX` if there
/// is none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn reclaim_slot() -> u32 {
    let now = time::now();
    for probe in 0..MAX_PROBES {
        if probe >= config::flow_probes() {
            break;
        }
        let Some(slot) = maps::take_flow_slot() else { break };
        let Some(flow) = maps::flow(slot) else { break };
        // SAFETY: as in `try_create`.
        let flow = unsafe { &*flow };
        if is_evictable(flow, now) {
            if flow.epoch != 0 {
                let reference = FlowRef { slot, epoch: flow.epoch };
                maps::remove_flow_key(&flow.forward, reference);
                maps::remove_flow_key(&flow.reply, reference);
            }
            return slot;
        }
        maps::put_flow_slot(slot);
    }
    u32::MAX
}

/// Finds a port of the node's range that makes the reply tuple unique, and claims that tuple.
#[inline(always)]
fn claim_reply_port(scratch: &mut Scratch, reference: FlowRef) -> bool {
    // a protocol without ports has one reply tuple per pair of addresses
    if scratch.transport & (Transport::PORTS | Transport::ECHO) == 0 {
        return claim_reply(scratch, reference, true);
    }
    for _ in 0..PORT_TRIES {
        pick_reply_port(scratch);
        if maps::claim_flow_key(&scratch.new_flow.reply_tuple, reference) {
            return true;
        }
    }
    for tried in 0..REUSED_PORT_TRIES {
        pick_reply_port(scratch);
        if claim_reply(scratch, reference, tried >= REUSED_PORT_TRIES / 2) {
            return true;
        }
    }
    false
}

/// Sets the destination of the reply tuple to a random port of the node's range.
#[inline(always)]
fn pick_reply_port(scratch: &mut Scratch) {
    let (first, count) = config::snat_ports();
    scratch.new_flow.reply_tuple.dst_port =
        Port::new(first.wrapping_add(hash::scale(random::random(), count) as u16));
    if scratch.transport & Transport::ECHO != 0 {
        scratch.new_flow.reply_tuple.src_port = scratch.new_flow.reply_tuple.dst_port;
    }
}

/// Claims the reply tuple if it is free, left over from an earlier flow of the same connection, or
/// of a connection that has ended. `last_resort`: as in [`tuple_reusable`].
#[inline(always)]
fn claim_reply(scratch: &mut Scratch, reference: FlowRef, last_resort: bool) -> bool {
    if maps::claim_flow_key(&scratch.new_flow.reply_tuple, reference) {
        return true;
    }
    // of two CPUs that release it, one gets it
    let released = global::call(scratch, || release_reply_key(last_resort.into())).unpack();
    matches!(released, Ok(true)) && maps::claim_flow_key(&scratch.new_flow.reply_tuple, reference)
}

/// Removes the flow that has the reply tuple, if its connection has ended. True if the tuple is
/// free then.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn release_reply_key(last_resort: u32) -> u32 {
    let Some(scratch) = scratch::current() else { return 0 };
    u32::from(try_release_reply_key(scratch, last_resort != 0))
}

#[inline(always)]
fn try_release_reply_key(scratch: &Scratch, last_resort: bool) -> bool {
    let Some(holder) = maps::flow_ref(&scratch.new_flow.reply_tuple) else { return true };
    let Some(flow) = maps::flow(holder.slot) else { return false };
    // SAFETY: as in `try_lookup`; read only, and a torn read at worst costs another port.
    let flow = unsafe { &*flow };
    // another CPU has just claimed it and is still writing the record
    if epoch(flow).wrapping_add(1) == holder.epoch {
        return false;
    }
    if epoch(flow) == holder.epoch && flow.forward != scratch.tuple {
        if !tuple_reusable(flow, time::now(), last_resort) {
            return false;
        }
        // both directions: a later packet of its client is a new connection
        maps::remove_flow_key(&flow.forward, holder);
    }
    maps::remove_flow_key(&scratch.new_flow.reply_tuple, holder);
    true
}

#[inline(always)]
fn epoch(flow: &Flow) -> u32 {
    // SAFETY: a live field; volatile, because another CPU may change it.
    unsafe { (&raw const flow.epoch).read_volatile() }
}

#[inline(always)]
fn set_epoch(flow: &mut Flow, epoch: u32) {
    // SAFETY: a live field; volatile, so that the write is not moved past those of the other
    // fields.
    unsafe { (&raw mut flow.epoch).write_volatile(epoch) };
}
