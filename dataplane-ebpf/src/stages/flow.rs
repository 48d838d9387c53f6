//! Connections that are translated per packet: finding their state, making it, giving it up.
//!
//! The layout and its invariants are in `dataplane_common::abi::flow`, the rules of ageing in
//! `dataplane_common::flow`. Nothing here depends on TCP sequence numbers, and nothing is ever evicted behind our back.

use dataplane_common::{
    abi::{Flow, FlowFlags, FlowKey, FlowRef, Port},
    flow::{Direction, State, gives_way, is_past, tcp_flags},
    hash,
    reason::DropReason,
};

use super::{Answer, parse::Transport, translate::NewFlow};
use crate::{
    config,
    maps::{self, Work},
    skb,
};

/// Source ports tried before the destination counts as exhausted.
const PORT_TRIES: u32 = 8;
/// Slots examined before the table counts as full. The verifier walks the loop; the node's setting may stop it earlier.
const MAX_PROBES: u32 = 8;

/// Whether a packet with tuple `work.from` belongs to a flow that is translated here: then `work.to` is the tuple it leaves with, and the flow has
/// seen a packet that says `work.transport`.
#[inline(always)]
pub(crate) fn lookup<N: NewFlow>(work: &mut Work) -> bool {
    let Some(reference) = maps::flow_ref(&work.from) else { return false };
    let Some(flow) = maps::flow(reference.slot) else { return false };
    // SAFETY: array values live as long as the map. Another processor may give the record to a new owner meanwhile; the
    // epoch, read again below, tells.
    let flow = unsafe { &mut *flow };
    if epoch(flow) != reference.epoch {
        return false;
    }
    let said = work.transport;
    let tcp = said as u8;
    let direction = if flow.forward == work.from { Direction::Forward } else { Direction::Reply };
    match direction {
        Direction::Forward if !N::begins_here(flow.flags) || is_over(flow, said) => return false,
        Direction::Forward => reverse(&flow.reply, &mut work.to),
        Direction::Reply if is_to_another(flow, tcp) => {
            maps::remove_flow_key(&work.from, reference);
            return false;
        }
        Direction::Reply => reverse(&flow.forward, &mut work.to),
    }
    if epoch(flow) != reference.epoch {
        return false;
    }
    work.direct = flow.flags & FlowFlags::DIRECT;
    // the answers to such packets pass elsewhere: who acknowledges has heard one
    let heard = work.direct != 0 && tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK;
    touch(flow, if heard { Direction::Reply } else { direction }, tcp);
    true
}

/// As [`lookup`], leaving no trace: for messages about a packet.
#[inline(always)]
pub(crate) fn peek<N: NewFlow>(work: &mut Work) -> bool {
    let Some(reference) = maps::flow_ref(&work.from) else { return false };
    let Some(flow) = maps::flow(reference.slot) else { return false };
    // SAFETY: as in `lookup`.
    let flow = unsafe { &*flow };
    let opposite = if flow.forward == work.from {
        if !N::begins_here(flow.flags) {
            return false;
        }
        &flow.reply
    } else {
        &flow.forward
    };
    reverse(opposite, &mut work.to);
    epoch(flow) == reference.epoch
}

/// Writes the tuple of the opposite direction, in place: a tuple is too large to be passed around.
#[inline(always)]
fn reverse(tuple: &FlowKey, into: &mut FlowKey) {
    into.src = tuple.dst;
    into.dst = tuple.src;
    into.src_port = tuple.dst_port;
    into.dst_port = tuple.src_port;
    into.protocol = tuple.protocol;
}

/// Whether a forward packet must choose anew, though its tuple is known: its backend has been removed, or a new
/// connection re-uses the ports of one that has ended.
#[inline(always)]
fn is_over(flow: &Flow, said: u32) -> bool {
    let tcp = said as u8;
    let opens = tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    if opens && State::from_number(flow.state) == State::Closing {
        return true;
    }
    // TCP and SCTP stay with their backend until one side ends the connection, as a removed pod drains its connections
    let may_move = said & Transport::HANDSHAKE == 0 || opens;
    may_move
        && flow.flags & FlowFlags::SERVICE != 0
        && maps::backend_generation(flow.backend_id) != flow.backend_generation
}

/// Whether a reply is to a connection that the client has meanwhile made to the backend itself, from the port it used here:
/// a new one through this flow would have begun it anew.
#[inline(always)]
fn is_to_another(flow: &Flow, tcp: u8) -> bool {
    let accepts = tcp_flags::SYN | tcp_flags::ACK;
    tcp & accepts == accepts
        && flow.flags & FlowFlags::SOURCE == 0
        && State::from_number(flow.state) == State::Closing
}

/// Stamps, written only when they change, so that a busy flow's line stays shared between processors.
#[inline(always)]
fn touch(flow: &mut Flow, direction: Direction, tcp: u8) {
    let now = skb::now();
    if flow.last_seen != now {
        flow.last_seen = now;
    }
    let state = State::from_number(flow.state).after(direction, tcp) as u32;
    if flow.state != state {
        flow.state = state;
    }
}

/// Makes the flow of packets `work.from`, whose replies arrive as `work.reply`, for `work.purpose`, and leaves in `work.to`
/// what the packets leave with.
///
/// If another flow owns the replies, or if the source is replaced, they are told apart by a port of the node's range.
///
/// # Errors
/// [`DropReason::FlowTableFull`], [`DropReason::PortsExhausted`].
#[inline(always)]
pub(crate) fn create(work: &mut Work) -> Result<(), DropReason> {
    #[inline(never)]
    fn outlined(work: &mut Work) -> Answer {
        try_create(work).map(|()| true).into()
    }
    outlined(work).get().map(|_| ())
}

#[inline(always)]
fn try_create(work: &mut Work) -> Result<(), DropReason> {
    let slot = admit();
    let Some(flow) = maps::flow(slot) else { return Err(DropReason::FlowTableFull) };
    // SAFETY: array values live as long as the map, and who holds the slot owns the record.
    let flow = unsafe { &mut *flow };
    let reference = FlowRef { slot, epoch: flow.epoch.wrapping_add(2) };
    // odd: whoever follows a stale reference to this record sees that it is no longer his
    set_epoch(flow, flow.epoch | 1);

    work.direct = work.purpose.flags & FlowFlags::DIRECT;
    let keep =
        work.direct != 0 || (work.purpose.source.is_unspecified() && claim_reply(work, reference, false));
    if !keep {
        if !work.purpose.source.is_unspecified() {
            work.reply.dst = work.purpose.source;
        }
        work.purpose.flags |= FlowFlags::SOURCE;
        if !claim_reply_port(work, reference) {
            set_epoch(flow, reference.epoch);
            maps::put_flow_slot(slot);
            return Err(DropReason::PortsExhausted);
        }
    }

    let now = skb::now();
    flow.forward = work.from;
    flow.reply = work.reply;
    flow.backend_id = work.purpose.backend_id;
    flow.backend_generation = work.purpose.backend_generation;
    flow.service_id = work.purpose.service_id;
    flow.last_seen = now;
    flow.created = now;
    flow.state = State::HalfOpen as u32;
    flow.flags = work.purpose.flags;
    set_epoch(flow, reference.epoch);
    // the insertion orders the record before it: a reader that finds the key finds the record complete
    let indexed = maps::set_flow_key(&work.from, reference);
    maps::put_flow_slot(slot);
    if !indexed {
        return Err(DropReason::FlowTableFull);
    }
    maps::open_gate(&work.reply.dst, work.from.protocol);
    reverse(&work.reply, &mut work.to);
    Ok(())
}

/// Takes a slot whose flow gives way, and removes what is left of that flow. `u32::MAX`: there is none.
#[inline(never)]
fn admit() -> u32 {
    let now = skb::now();
    for probe in 0..MAX_PROBES {
        if probe >= config::flow_probes() {
            break;
        }
        let Some(slot) = maps::take_flow_slot() else { break };
        let Some(flow) = maps::flow(slot) else { break };
        // SAFETY: as in `try_create`.
        let flow = unsafe { &*flow };
        if gives_way(flow, now) {
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

/// Finds a port of the node's range under which replies are nobody else's, and claims it.
#[inline(never)]
fn claim_reply_port(work: &mut Work, reference: FlowRef) -> bool {
    // a protocol without ports has a single place per pair of addresses
    if work.transport & (Transport::PORTS | Transport::ECHO) == 0 {
        return claim_reply(work, reference, true);
    }
    let (first, count) = config::snat_ports();
    for tried in 0..PORT_TRIES {
        work.reply.dst_port = Port::new(first.wrapping_add(hash::scale(skb::random(), count) as u16));
        if work.transport & Transport::ECHO != 0 {
            work.reply.src_port = work.reply.dst_port;
        }
        if claim_reply(work, reference, tried >= PORT_TRIES / 2) {
            return true;
        }
    }
    false
}

/// Claims `work.reply`: free, left behind by an earlier flow of the same connection, or of a connection that is past.
#[inline(always)]
fn claim_reply(work: &Work, reference: FlowRef, pressed: bool) -> bool {
    if maps::claim_flow_key(&work.reply, reference) {
        return true;
    }
    // of two that find it past, one gets it
    free_reply(work, pressed) && maps::claim_flow_key(&work.reply, reference)
}

/// Takes `work.reply` from its holder, if that may be: whether it was.
#[inline(never)]
fn free_reply(work: &Work, pressed: bool) -> bool {
    let Some(holder) = maps::flow_ref(&work.reply) else { return true };
    let Some(flow) = maps::flow(holder.slot) else { return false };
    // SAFETY: as in `lookup`; read only, and a torn read at worst costs another port.
    let flow = unsafe { &*flow };
    if epoch(flow) == holder.epoch && flow.forward != work.from {
        if !is_past(flow, skb::now(), pressed) {
            return false;
        }
        // it dies whole: should its client speak again, that is a new connection
        maps::remove_flow_key(&flow.forward, holder);
    }
    maps::remove_flow_key(&work.reply, holder);
    true
}

#[inline(always)]
fn epoch(flow: &Flow) -> u32 {
    // SAFETY: a live field; volatile because another processor may change it.
    unsafe { (&raw const flow.epoch).read_volatile() }
}

#[inline(always)]
fn set_epoch(flow: &mut Flow, epoch: u32) {
    // SAFETY: a live field; volatile so that it is written where it stands, around the other fields.
    unsafe { (&raw mut flow.epoch).write_volatile(epoch) };
}
