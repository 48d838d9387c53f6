//! Flows: connection tracking of connections that are translated per packet. Looks flows up;
//! [`create`](mod@create) creates them, in a slot that [`slot`] finds.
//!
//! Layout and invariants of the tables are in `dataplane_common::abi::flow`, timeouts and states in
//! `dataplane_common::flow`. TCP sequence numbers play no part, and no map evicts entries by
//! itself.

mod create;
mod slot;

use dataplane_common::{
    abi::{CachedNextHop, Flow, FlowFlags, FlowKey, FlowRef},
    flow::{Direction, State, is_absent, tcp_flags},
};

pub(crate) use self::create::create;
use super::parse::Transport;
use crate::{
    global,
    helpers::time,
    maps,
    scratch::{self, NextHopSearch, Scratch},
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
    scratch.new_flow.replaced_epoch = 0;
    let Some(reference) = maps::flow_ref(&scratch.tuple) else { return false };
    let now = time::now();
    let Some(mut found) = find(scratch, reference, forward_kinds, now) else {
        scratch.new_flow.replaced_slot = reference.slot;
        scratch.new_flow.replaced_epoch = reference.epoch;
        return false;
    };
    // behind a second flow, the packet's next hop is not that of the first
    let is_first = scratch.next_hop.entry == NextHopSearch::OPEN;
    scratch.next_hop.entry =
        if is_first && found.lasts(now) { found.next_hop_index() } else { NextHopSearch::NONE };
    scratch.next_hop.epoch = reference.epoch;
    if found.direction == Direction::Reply && is_to_direct_connection(found.flow, scratch.transport as u8) {
        maps::remove_flow_key(&scratch.tuple, reference);
        return false;
    }
    let is_first_this_second = found.record(scratch, forward_kinds, now);
    // a row of that address added since the flow was created does not have the hint
    if is_first_this_second && found.direction == Direction::Forward {
        let tuple = &scratch.nat_tuple;
        maps::mark_may_have_flows(&tuple.src, tuple.protocol, tuple.src_port);
    }
    true
}

/// Looks up the flow of the packet with tuple `scratch.tuple`, and its cached next hop. True if
/// there is one for packets that arrive on the device `ingress`, of `length` bytes of IP packet, on
/// the device `egress` (0: any): then it is `scratch.next_hop.found`, and the rest is as after
/// [`lookup`].
#[inline(always)]
pub(crate) fn lookup_with_next_hop(scratch: &mut Scratch, ingress: u32, egress: u32, length: u32) -> bool {
    matches!(global::call(scratch, || find_next_hop(ingress, egress, length)).unpack(), Ok(true))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_next_hop(ingress: u32, egress: u32, length: u32) -> u32 {
    scratch::current().map_or(0, |scratch| u32::from(try_find_next_hop(scratch, ingress, egress, length)))
}

#[inline(always)]
fn try_find_next_hop(scratch: &mut Scratch, ingress: u32, egress: u32, length: u32) -> bool {
    // before anything that the next hop depends on is read
    scratch.next_hop.generation = maps::forwarding_generation();
    scratch.next_hop.entry = NextHopSearch::OPEN;
    let Some(reference) = maps::flow_ref(&scratch.tuple) else {
        scratch.next_hop.missed = 1;
        return false;
    };
    let now = time::now();
    let Some(mut found) = find(scratch, reference, kinds::ANY, now) else { return false };
    let Some(entry) = maps::flow_next_hop(found.next_hop_index()) else { return false };
    // SAFETY: array values live as long as the map. Another CPU may write it: the checksum tells.
    unsafe { (&raw mut scratch.next_hop.found).copy_from_nonoverlapping(entry, 1) };
    let cached = &scratch.next_hop.found;
    let is_exception = found.direction == Direction::Reply
        && (found.flow.flags & FlowFlags::STACK != 0
            || is_to_direct_connection(found.flow, scratch.transport as u8));
    let differs = cached.epoch ^ reference.epoch
        | cached.generation ^ scratch.next_hop.generation
        | cached.second ^ now
        | cached.ingress ^ ingress
        | if egress == 0 { 0 } else { cached.egress ^ egress };
    if differs != 0 || is_exception || !cached.is_intact() || !cached.fits(length) {
        return false;
    }
    if cached.verdict == CachedNextHop::NONE {
        scratch.next_hop.entry = NextHopSearch::NONE;
        return false;
    }
    // not the first of this second: that one has found the next hop
    let _is_first_this_second = found.record(scratch, kinds::ANY, now);
    true
}

/// A flow, and which of its directions a packet belongs to.
struct Found {
    flow: &'static mut Flow,
    slot: u32,
    direction: Direction,
}

/// The flow of the packet with tuple `scratch.tuple`; then `scratch.nat_tuple` is the tuple it
/// leaves with. Changes nothing.
#[inline(always)]
fn find(scratch: &mut Scratch, reference: FlowRef, forward_kinds: u32, now: u32) -> Option<Found> {
    // SAFETY: array values live as long as the map. Another CPU may give the record to a new flow
    // meanwhile; the epoch, read again below, tells.
    let flow = unsafe { &mut *maps::flow(reference.slot)? };
    if epoch(flow) != reference.epoch || is_absent(flow, now) {
        return None;
    }
    let transport = scratch.transport;
    let direction = if flow.forward == scratch.tuple { Direction::Forward } else { Direction::Reply };
    match direction {
        Direction::Forward if forward_kinds & kind_of(flow.flags) == 0 || must_reselect(flow, transport) => {
            return None;
        }
        // it answers a ping of the other side, with the same identifier
        Direction::Forward if transport & (Transport::ECHO | Transport::ECHO_REQUEST) == Transport::ECHO => {
            return None;
        }
        Direction::Forward => reverse(&flow.reply, &mut scratch.nat_tuple),
        // its identifier is the sender's own
        Direction::Reply if transport & Transport::ECHO_REQUEST != 0 => return None,
        Direction::Reply => reverse(&flow.forward, &mut scratch.nat_tuple),
    }
    if epoch(flow) != reference.epoch {
        return None;
    }
    Some(Found { flow, slot: reference.slot, direction })
}

impl Found {
    /// Its entry in `FLOW_NEXT_HOPS`.
    #[inline(always)]
    fn next_hop_index(&self) -> u32 {
        CachedNextHop::index(self.slot, self.direction == Direction::Reply)
    }

    /// Whether more packets are likely: both ends have answered, or the flow is a second old.
    #[inline(always)]
    fn lasts(&self, now: u32) -> bool {
        self.flow.state == State::Established as u32 || self.flow.created != now
    }

    /// Updates the flow by a packet, and `scratch.nat` by the flow. True for the first packet of a
    /// second.
    #[inline(always)]
    fn record(&mut self, scratch: &mut Scratch, forward_kinds: u32, now: u32) -> bool {
        let (flow, tcp) = (&mut *self.flow, scratch.transport as u8);
        if self.direction == Direction::Forward {
            follow_stack(flow, forward_kinds);
        }
        scratch.nat.flow_flags = flow.flags;
        if scratch.nat.is_direct() {
            record_direct_packet(flow, tcp, now)
        } else {
            record_packet(flow, self.direction, tcp, now)
        }
    }
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
/// that there was one, and a FIN counts as one of each side. The ACK of the server's FIN, which
/// follows it, is no sign that the connection goes on.
#[inline(always)]
fn record_direct_packet(flow: &mut Flow, tcp: u8, now: u32) -> bool {
    let is_reply_seen = tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK;
    let fin = tcp & tcp_flags::FIN;
    let is_first_this_second = (is_reply_seen || fin != 0) && record_packet(flow, Direction::Reply, fin, now);
    record_packet(flow, Direction::Forward, tcp, now) || is_first_this_second
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
