//! Connections that are translated per packet: finding their state, making it, giving it up.
//!
//! The layout and its invariants are in `dataplane_common::abi::flow`, the rules of ageing in
//! `dataplane_common::flow`. Nothing here depends on TCP sequence numbers, and nothing is ever evicted behind our back.

use dataplane_common::{
    abi::{Flow, FlowFlags, FlowKey, FlowRef, Port},
    flow::{Direction, State, is_evictable, tcp_flags, tuple_reusable},
    hash,
    reason::DropReason,
};

use super::{Answer, parse::Transport};
use crate::{
    config,
    maps::{self, Work},
    skb,
};

/// Source ports tried, if they are free, before those of connections that are past.
const PORT_TRIES: u32 = 32;
/// And those, before the destination counts as exhausted.
const PAST_PORT_TRIES: u32 = 6;
/// Slots examined before the table counts as full. The verifier walks the loop; the node's setting may stop it earlier.
const MAX_PROBES: u32 = 8;

/// Flows whose forward packets are translated at one place: a bit each.
pub(crate) mod kinds {
    /// Those of services.
    pub(crate) const SERVICE: u32 = 1;
    /// Those under the node's address.
    pub(crate) const MASQUERADE: u32 = 2;
    /// All.
    pub(crate) const ANY: u32 = SERVICE | MASQUERADE;
}

/// Whether forward packets of a flow with these [`FlowFlags`] are translated where flows of `kinds` are.
#[inline(always)]
const fn begins_here(flags: u32, kinds: u32) -> bool {
    let kind = if flags & FlowFlags::SERVICE != 0 { kinds::SERVICE } else { kinds::MASQUERADE };
    kinds & kind != 0
}

/// Whether a packet with tuple `work.from` belongs to a flow that is translated here: then `work.to` is the tuple it leaves with, and the flow has
/// seen a packet that says `work.transport`. `kinds`: the flows whose forward packets are.
#[inline(always)]
pub(crate) fn lookup(work: &mut Work, kinds: u32) -> bool {
    maps::lend(work, || find_flow(kinds)) != 0
}

/// A function of its own to the verifier, which it walks once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_flow(kinds: u32) -> u32 {
    maps::work().map_or(0, |work| u32::from(find(work, kinds)))
}

#[inline(always)]
fn find(work: &mut Work, kinds: u32) -> bool {
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
        Direction::Forward if !begins_here(flow.flags, kinds) || is_over(flow, said) => return false,
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
    let is_news = if work.direct == 0 { touch(flow, direction, tcp) } else { touch_direct(flow, tcp) };
    // the row of an address that came since, or came back, has its gate closed
    if is_news && direction == Direction::Forward {
        maps::mark_may_have_flows(&work.to.src, work.from.protocol);
    }
    true
}

/// As [`touch`], of a flow whose answers pass elsewhere: who acknowledges has heard one, and who ends it ends it for both.
#[inline(always)]
fn touch_direct(flow: &mut Flow, tcp: u8) -> bool {
    let heard = tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::ACK;
    let ends = tcp & tcp_flags::FIN != 0;
    touch(
        flow,
        if heard { Direction::Reply } else { Direction::Forward },
        if ends { tcp | tcp_flags::RST } else { tcp },
    )
}

/// As [`lookup`], leaving no trace: for messages about a packet.
#[inline(always)]
pub(crate) fn peek(work: &mut Work, kinds: u32) -> bool {
    let Some(reference) = maps::flow_ref(&work.from) else { return false };
    let Some(flow) = maps::flow(reference.slot) else { return false };
    // SAFETY: as in `lookup`.
    let flow = unsafe { &*flow };
    let opposite = if flow.forward == work.from {
        if !begins_here(flow.flags, kinds) {
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
    let opens = tcp_flags::opens(tcp);
    let state = State::from_number(flow.state);
    // nodes that do not agree on the backend hand it back and forth, until one of them looks again
    let is_astray = flow.flags & FlowFlags::DIRECT != 0 && state == State::HalfOpen;
    if opens && (state.is_ending() || is_astray) {
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
        && State::from_number(flow.state).is_ending()
}

/// Stamps, written only when they change, so that a busy flow's line stays shared between processors. Whether it is the first
/// packet of this second.
#[inline(always)]
fn touch(flow: &mut Flow, direction: Direction, tcp: u8) -> bool {
    let now = skb::now();
    let is_news = flow.last_seen != now;
    if is_news {
        flow.last_seen = now;
    }
    let state = State::number_after(flow.state, direction, tcp);
    if flow.state != state {
        flow.state = state;
    }
    is_news
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
    Answer::from_number(maps::lend(work, || create_flow())).get().map(|_| ())
}

/// A function of its own to the verifier, which it walks once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn create_flow() -> u32 {
    let Some(work) = maps::work() else { return DropReason::WriteFailed.number().into() };
    Answer::from(try_create(work).map(|()| true)).number()
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
    let keep = work.direct != 0 || (work.purpose.source.is_zero() && claim_reply(work, reference, false));
    if !keep {
        if !work.purpose.source.is_zero() {
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
    maps::mark_may_have_flows(&work.reply.dst, work.from.protocol);
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

/// Finds a port of the node's range under which replies are nobody else's, and claims it.
#[inline(always)]
fn claim_reply_port(work: &mut Work, reference: FlowRef) -> bool {
    // a protocol without ports has a single place per pair of addresses
    if work.transport & (Transport::PORTS | Transport::ECHO) == 0 {
        return claim_reply(work, reference, true);
    }
    for _ in 0..PORT_TRIES {
        draw_reply_port(work);
        if maps::claim_flow_key(&work.reply, reference) {
            return true;
        }
    }
    for tried in 0..PAST_PORT_TRIES {
        draw_reply_port(work);
        if claim_reply(work, reference, tried >= PAST_PORT_TRIES / 2) {
            return true;
        }
    }
    false
}

/// Any port of the node's range.
#[inline(always)]
fn draw_reply_port(work: &mut Work) {
    let (first, count) = config::snat_ports();
    work.reply.dst_port = Port::new(first.wrapping_add(hash::scale(skb::random(), count) as u16));
    if work.transport & Transport::ECHO != 0 {
        work.reply.src_port = work.reply.dst_port;
    }
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
    // just claimed, by who is still writing the record
    if epoch(flow).wrapping_add(1) == holder.epoch {
        return false;
    }
    if epoch(flow) == holder.epoch && flow.forward != work.from {
        if !tuple_reusable(flow, skb::now(), pressed) {
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
