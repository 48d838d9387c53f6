//! Life cycle of a flow: its state, its timeout, and which flows a full table gives up first.
//!
//! Pure rules, applied by the datapath and shown by the agent. TCP state follows from flags alone,
//! never from sequence numbers: an out-of-window packet is translated like any other. SCTP chunks
//! count as the corresponding TCP flags ([`SctpHeader::flags`](crate::net::SctpHeader::flags)).

use crate::{
    abi::{Flow, FlowFlags},
    net::Protocol,
};

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum State {
    /// No reply has been seen.
    HalfOpen = 1,
    /// A packet, its answer, and another packet of the client were seen.
    Established = 2,
    /// Closed: both sides have sent a FIN.
    Closing = 3,
    /// A reply was seen, and no packet of the client since: its address may be forged.
    Answered = 4,
    /// Half-closed: the client has sent a FIN; the server may still send.
    EndedForward = 5,
    /// Half-closed: the server has sent a FIN; the client may still send.
    EndedReply = 6,
    /// A side has sent an RST, or somebody else in its name: who knows no sequence numbers cannot
    /// tell (RFC 5961 §3). Packets of both sides show that the connection goes on.
    Reset = 7,
    /// [`Self::Reset`], and since then a packet of the client.
    ResetForward = 8,
    /// [`Self::Reset`], and since then a packet of the server.
    ResetReply = 9,
    /// A side has sent an RST before the connection was established: the server refuses it, or the
    /// client's address is forged.
    Refused = 10,
}

/// Direction of a packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// As the packet that created the flow.
    Forward,
    /// The opposite direction.
    Reply,
}

/// TCP flags that change the state, as bits of byte 13 of the header (RFC 9293 §3.1).
pub mod tcp_flags {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// ACK.
    pub const ACK: u8 = 16;

    /// Whether a segment opens a connection (SYN without ACK).
    #[inline(always)]
    pub const fn is_initial_syn(flags: u8) -> bool {
        flags & (SYN | ACK) == SYN
    }
}

impl State {
    /// From the number stored in a flow; an unknown one counts as half-open, which is given up
    /// first.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            2 => Self::Established,
            3 => Self::Closing,
            4 => Self::Answered,
            5 => Self::EndedForward,
            6 => Self::EndedReply,
            7 => Self::Reset,
            8 => Self::ResetForward,
            9 => Self::ResetReply,
            10 => Self::Refused,
            _ => Self::HalfOpen,
        }
    }

    /// Whether a side has closed the connection, so that a SYN with the same tuple opens a new one.
    #[inline(always)]
    pub const fn is_ending(self) -> bool {
        matches!(self, Self::EndedForward | Self::EndedReply) || self.is_closed()
    }

    /// Whether no more packets are expected: both sides have closed it, or one by an RST.
    #[inline(always)]
    const fn is_closed(self) -> bool {
        matches!(self, Self::Closing | Self::Reset | Self::ResetForward | Self::ResetReply | Self::Refused)
    }

    /// The state after a packet in `direction` with these TCP flags (0 for protocols without a
    /// handshake).
    #[inline(always)]
    #[must_use]
    pub const fn after(self, direction: Direction, flags: u8) -> Self {
        if flags & tcp_flags::RST != 0 {
            return match self {
                Self::Closing => self,
                Self::HalfOpen | Self::Answered | Self::Refused => Self::Refused,
                _ => Self::Reset,
            };
        }
        let (opens, ends) = (flags & tcp_flags::SYN != 0, flags & tcp_flags::FIN != 0);
        match (self, direction) {
            (Self::Closing, _) => Self::Closing,
            (Self::Reset | Self::ResetForward | Self::ResetReply, _) | (Self::Refused, Direction::Reply)
                if opens =>
            {
                self
            }
            (Self::Refused, Direction::Reply) => Self::Answered.after(direction, flags),
            (Self::Reset, Direction::Forward) => Self::ResetForward,
            (Self::Reset, Direction::Reply) => Self::ResetReply,
            (Self::ResetForward, Direction::Reply) | (Self::ResetReply, Direction::Forward) => {
                Self::Established.after(direction, flags)
            }
            (Self::EndedForward, Direction::Reply) | (Self::EndedReply, Direction::Forward) if ends => {
                Self::Closing
            }
            // of the first two the address may be forged, and its FIN too (as nf_conntrack)
            (Self::HalfOpen | Self::Refused, Direction::Forward)
            | (Self::EndedForward | Self::EndedReply | Self::ResetForward | Self::ResetReply, _) => self,
            (_, Direction::Forward) if ends => Self::EndedForward,
            (_, Direction::Reply) if ends => Self::EndedReply,
            (Self::HalfOpen, Direction::Reply) => Self::Answered,
            (Self::Answered, Direction::Forward) if !opens => Self::Established,
            (state, _) => state,
        }
    }

    /// As [`Self::after`], on the number stored in a flow, and as a table lookup, because the
    /// verifier follows each branch of the rule.
    #[inline(always)]
    #[must_use]
    pub const fn next_raw(number: u32, direction: Direction, flags: u8) -> u32 {
        TRANSITIONS[table_index(number, matches!(direction, Direction::Reply), flags)] as u32
    }

    /// Seconds without a packet after which a flow of `protocol` expires.
    #[inline(always)]
    pub const fn timeout(self, protocol: u8) -> u32 {
        match (protocol, self) {
            (Protocol::TCP, Self::HalfOpen | Self::Answered) => 60,
            // longer than the two hours before the first TCP keep-alive (RFC 9293 §3.8.4)
            (Protocol::TCP, Self::Established) => 8_000,
            // kube-proxy's default of `--conntrack-tcp-timeout-close-wait`
            (Protocol::TCP, Self::EndedForward | Self::EndedReply) => 3_600,
            (Protocol::UDP, Self::Established | Self::Answered) => 180,
            // as nf_conntrack: an idle association sends a heartbeat every 30 seconds (RFC 9260
            // §16, "HB.interval")
            (Protocol::SCTP, Self::Established) => 210,
            // closed, without a reply, or ICMP
            _ => 30,
        }
    }
}

impl State {
    /// Seconds without a packet after which a full table may give up the flow for another.
    #[inline(always)]
    const fn idle_after(self, protocol: u8) -> u32 {
        match (self, protocol) {
            _ if self.is_closed() => 5,
            // a response may take a while, but half-closed connections that never close are common
            (Self::EndedForward | Self::EndedReply, _) => HALF_CLOSED,
            (_, Protocol::TCP | Protocol::SCTP) => self.timeout(protocol) + 1,
            // RFC 4787, REQ-5
            _ => 120,
        }
    }
}

/// Seconds without a packet after which a half-closed connection counts for little.
const HALF_CLOSED: u32 = 120;

/// Index into [`TRANSITIONS`].
#[inline(always)]
const fn table_index(number: u32, is_reply: bool, flags: u8) -> usize {
    // FIN, SYN and RST are the lowest three bits
    (number as usize & 15) << 4 | (is_reply as usize) << 3 | flags as usize & 7
}

/// [`State::after`] for every state, direction and combination of FIN, SYN and RST.
static TRANSITIONS: [u8; 256] = {
    let mut numbers = [0; 256];
    let mut place = 0;
    while place < numbers.len() {
        let direction = if place & 8 == 0 { Direction::Forward } else { Direction::Reply };
        numbers[place] = State::from_number(place as u32 >> 4).after(direction, place as u8 & 7) as u8;
        place += 1;
    }
    numbers
};

/// Whether `flow` has exceeded its timeout at `now` (seconds of `CLOCK_MONOTONIC`).
#[inline(always)]
pub const fn is_expired(flow: &Flow, now: u32) -> bool {
    now.saturating_sub(flow.last_seen) > State::from_number(flow.state).timeout(flow.forward.protocol)
}

/// Whether the datapath treats `flow` as if it did not exist: it has expired. An established TCP
/// connection lives on while nothing needs its slot: a client that has been silent for hours need
/// not connect again.
#[inline(always)]
pub const fn is_absent(flow: &Flow, now: u32) -> bool {
    let lives_on = flow.forward.protocol == Protocol::TCP && flow.state == State::Established as u32;
    !lives_on && is_expired(flow, now)
}

/// How far a new flow goes to get a reply tuple that another has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Need {
    /// There are other tuples: the flow has expired, and so has what its server remembers of the
    /// connection.
    Least = 0,
    /// There may be other tuples: the connection is closed, and no packet of it is in flight.
    Little = 1,
    /// There is hardly another: also if hardly a packet of it will follow.
    Great = 2,
    /// As a last resort, also if nothing shows that it is more than a packet with a forged source.
    Last = 3,
}

impl Need {
    /// From its number; an unknown one is the least.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Little,
            2 => Self::Great,
            3 => Self::Last,
            _ => Self::Least,
        }
    }
}

/// Seconds for which a server remembers a closed connection, and may refuse another with the same
/// ports: Linux's `TCP_TIMEWAIT_LEN`.
const TIME_WAIT: u32 = 60;

/// Whether a new flow may take the reply tuple of `flow`, whose slot has this class.
/// `from_outside`: the new one is from outside of the node.
#[inline(always)]
pub const fn tuple_reusable(flow: &Flow, class: SlotClass, now: u32, need: Need, from_outside: bool) -> bool {
    let state = State::from_number(flow.state);
    let idle = now.saturating_sub(flow.last_seen);
    let is_tcp = flow.forward.protocol == Protocol::TCP;
    if matches!(need, Need::Least) {
        return is_expired(flow, now) && (!is_tcp || idle > TIME_WAIT);
    }
    let closed = state.is_closed() && idle >= if matches!(need, Need::Little) { 5 } else { 1 };
    if closed || is_expired(flow, now) {
        return true;
    }
    match need {
        Need::Least | Need::Little => false,
        // an exchange of two datagrams, ten seconds ago, is over
        Need::Great => match class {
            SlotClass::Idle => true,
            SlotClass::UnconfirmedOutside => idle >= 1,
            SlotClass::UnconfirmedInside => matches!(state, State::Answered) && idle >= 10,
            SlotClass::Free | SlotClass::Kept => false,
        },
        Need::Last => match class {
            SlotClass::Idle | SlotClass::UnconfirmedOutside => true,
            SlotClass::UnconfirmedInside => !from_outside && idle >= 2,
            SlotClass::Free | SlotClass::Kept => false,
        },
    }
}

/// Which flows may take a slot of `FLOWS`, and how readily: each class before the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum SlotClass {
    /// Never used, or its flow is absent.
    Free = 0,
    /// Its flow comes from outside of the node, and nothing shows that its client exists: a flood
    /// with forged sources consists of such flows.
    UnconfirmedOutside = 1,
    /// Closed, half-closed or idle for so long that hardly a packet will follow.
    Idle = 2,
    /// Its flow comes from this node, and has had no answer, or only one. Not for a flow from
    /// outside.
    UnconfirmedInside = 3,
    /// Its flow is kept until its timeout.
    Kept = 4,
}

impl SlotClass {
    /// From its number; an unknown one is kept.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Free,
            1 => Self::UnconfirmedOutside,
            2 => Self::Idle,
            3 => Self::UnconfirmedInside,
            _ => Self::Kept,
        }
    }

    /// The class of a slot at `now` (seconds of `CLOCK_MONOTONIC`).
    #[inline(always)]
    #[must_use]
    pub const fn of(flow: &Flow, now: u32) -> Self {
        if flow.epoch == 0 {
            return Self::Free;
        }
        // being written
        if !flow.epoch.is_multiple_of(2) {
            return Self::Kept;
        }
        if is_absent(flow, now) {
            return Self::Free;
        }
        let state = State::from_number(flow.state);
        let is_unconfirmed = matches!(state, State::HalfOpen | State::Answered | State::Refused);
        if is_unconfirmed && flow.flags & FlowFlags::OUTSIDE != 0 {
            return Self::UnconfirmedOutside;
        }
        let idle = now.saturating_sub(flow.last_seen);
        let may_answer = matches!(state, State::HalfOpen | State::Answered);
        if !may_answer && idle >= state.idle_after(flow.forward.protocol) {
            Self::Idle
        } else if is_unconfirmed {
            Self::UnconfirmedInside
        } else {
            Self::Kept
        }
    }
}

#[cfg(test)]
mod tests;
