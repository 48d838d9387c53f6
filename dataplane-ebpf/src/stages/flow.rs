//! Flows: connection tracking of connections that are translated per packet. Looks flows up;
//! [`create`](mod@create) creates them, in a slot that [`slot`] finds.
//!
//! Layout and invariants of the tables are in `dataplane_common::abi::flow`, timeouts and states in
//! `dataplane_common::flow`. TCP sequence numbers play no part, and no map evicts entries by
//! itself.

mod create;
mod slot;

use dataplane_common::{
    abi::{Flow, FlowFlags, FlowKey},
    flow::{Direction, State, is_absent, tcp_flags},
};

pub(crate) use self::create::create;
use super::parse::Transport;
use crate::{
    global,
    helpers::time,
    maps,
    scratch::{self, Scratch},
};

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

/// The kind of the flow with these [`FlowFlags`].
#[inline(always)]
const fn kind_of(flags: u32) -> u32 {
    if flags & FlowFlags::SERVICE != 0 { kinds::SERVICE } else { kinds::MASQUERADE }
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
        Direction::Forward if forward_kinds & kind_of(flow.flags) == 0 || must_reselect(flow, transport) => {
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
    let closes = if tcp & tcp_flags::FIN == 0 { 0 } else { tcp_flags::RST };
    let is_first_this_second = is_reply_seen && record_packet(flow, Direction::Reply, 0, now);
    record_packet(flow, Direction::Forward, tcp | closes, now) || is_first_this_second
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
        if forward_kinds & kind_of(flow.flags) == 0 {
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
