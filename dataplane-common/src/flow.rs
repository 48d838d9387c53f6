//! Life of a flow: its state, how long it may be idle, and who goes first when the table is full.
//!
//! Pure rules: the datapath admits and ages flows by them, the agent shows them. TCP state is read from flags alone,
//! never from sequence numbers: an out-of-window packet is translated like any other. SCTP's chunks
//! are taken for such flags ([`SctpHeader::flags`](crate::net::SctpHeader::flags)).

use crate::{abi::Flow, net::Protocol};

/// How far a connection has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum State {
    /// Nobody has answered.
    HalfOpen = 1,
    /// Both sides have spoken; of a handshake, all three parts of it were seen.
    Established = 2,
    /// Both sides have ended it, or one has reset it.
    Closing = 3,
    /// A handshake was answered, which is not yet confirmed: who asked may not exist.
    Answered = 4,
    /// Who began it has said all (FIN); the other side may go on.
    EndedForward = 5,
    /// The other side has said all; who began it may go on.
    EndedReply = 6,
}

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// As the packet that made the flow.
    Forward,
    /// Back.
    Reply,
}

/// TCP flags that matter here, as bits of byte 13 of the header (RFC 9293 §3.1).
pub mod tcp_flags {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// ACK.
    pub const ACK: u8 = 16;

    /// Whether a segment asks for a connection.
    #[inline(always)]
    pub const fn opens(flags: u8) -> bool {
        flags & (SYN | ACK) == SYN
    }
}

impl State {
    /// From the number kept in a flow; what is unknown counts as half-open, the first to go.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        match number {
            2 => Self::Established,
            3 => Self::Closing,
            4 => Self::Answered,
            5 => Self::EndedForward,
            6 => Self::EndedReply,
            _ => Self::HalfOpen,
        }
    }

    /// Whether a side has ended the connection: who begins one with the same tuple has given it up.
    #[inline(always)]
    pub const fn is_ending(self) -> bool {
        matches!(self, Self::Closing | Self::EndedForward | Self::EndedReply)
    }

    /// The state after a packet in `direction` with these TCP flags (0 for protocols without a handshake).
    #[inline(always)]
    #[must_use]
    pub const fn after(self, direction: Direction, flags: u8) -> Self {
        if flags & tcp_flags::RST != 0 {
            return Self::Closing;
        }
        let (opens, ends) = (flags & tcp_flags::SYN != 0, flags & tcp_flags::FIN != 0);
        match (self, direction) {
            (Self::Closing, _) => Self::Closing,
            (Self::EndedForward, Direction::Reply) | (Self::EndedReply, Direction::Forward) if ends => {
                Self::Closing
            }
            (Self::EndedForward | Self::EndedReply, _) => self,
            (_, Direction::Forward) if ends => Self::EndedForward,
            (_, Direction::Reply) if ends => Self::EndedReply,
            (Self::HalfOpen, Direction::Reply) if opens => Self::Answered,
            (Self::HalfOpen, Direction::Reply) => Self::Established,
            (Self::Answered, Direction::Forward) if !opens => Self::Established,
            (state, _) => state,
        }
    }

    /// As [`Self::after`], of the number kept in a flow, and by a look into a table: to the verifier a rule with many ways is many
    /// programs.
    #[inline(always)]
    #[must_use]
    pub const fn number_after(number: u32, direction: Direction, flags: u8) -> u32 {
        NUMBERS[place(number, matches!(direction, Direction::Reply), flags)] as u32
    }

    /// Seconds without a packet after which a flow of `protocol` is over.
    #[inline(always)]
    pub const fn timeout(self, protocol: u8) -> u32 {
        match (protocol, self) {
            (Protocol::TCP, Self::HalfOpen | Self::Answered) => 60,
            // longer than the two hours after which TCP keep-alive first speaks (RFC 9293 §3.8.4)
            (Protocol::TCP, Self::Established) => 8_000,
            // as kube-proxy has it (`--conntrack-tcp-timeout-close-wait`)
            (Protocol::TCP, Self::EndedForward | Self::EndedReply) => 3_600,
            (Protocol::UDP, Self::Established) => 180,
            // as nf_conntrack has it: an idle association says so every 30 seconds (RFC 9260 §16, "HB.interval")
            (Protocol::SCTP, Self::Established) => 210,
            // closed, unanswered, or ICMP
            _ => 30,
        }
    }

    /// Seconds after which the flow may give way to a new one in a full table; `None`: never before its timeout.
    #[inline(always)]
    const fn evictable_after(self, protocol: u8) -> Option<u32> {
        match (self, protocol) {
            (Self::HalfOpen | Self::Answered, _) => Some(2),
            (Self::Closing, _) => Some(5),
            // an answer takes its time, but an end that never comes is common
            (Self::EndedForward | Self::EndedReply, _) => Some(120),
            (Self::Established, Protocol::TCP | Protocol::SCTP) => None,
            (Self::Established, _) => Some(30),
        }
    }
}

/// Where the table has what follows.
#[inline(always)]
const fn place(number: u32, is_reply: bool, flags: u8) -> usize {
    // FIN, SYN and RST are the lowest three bits
    (number as usize & 7) << 4 | (is_reply as usize) << 3 | flags as usize & 7
}

/// [`State::after`] of everything it depends on.
static NUMBERS: [u8; 128] = {
    let mut numbers = [0; 128];
    let mut place = 0;
    while place < numbers.len() {
        let direction = if place & 8 == 0 { Direction::Forward } else { Direction::Reply };
        numbers[place] = State::from_number(place as u32 >> 4).after(direction, place as u8 & 7) as u8;
        place += 1;
    }
    numbers
};

/// Whether `flow` has been idle for longer than its state allows, at `now` (seconds of `CLOCK_MONOTONIC`).
#[inline(always)]
pub const fn is_expired(flow: &Flow, now: u32) -> bool {
    now.saturating_sub(flow.last_seen) > State::from_number(flow.state).timeout(flow.forward.protocol)
}

/// Whether another connection may have the tuple under which replies to `flow` arrive: it has expired, or was closed so long
/// ago that no packet of it is on its way. `pressed`: no better one was found.
#[inline(always)]
pub const fn tuple_reusable(flow: &Flow, now: u32, pressed: bool) -> bool {
    let rest = if pressed { 1 } else { 5 };
    let is_closed = matches!(State::from_number(flow.state), State::Closing);
    (is_closed && now.saturating_sub(flow.last_seen) >= rest) || is_expired(flow, now)
}

/// Whether a new flow may take the slot of `flow`: never used, expired, without a handshake that is complete, ending, or idle
/// where there is none.
#[inline(always)]
pub const fn is_evictable(flow: &Flow, now: u32) -> bool {
    if flow.epoch == 0 {
        return true;
    }
    let idle = now.saturating_sub(flow.last_seen);
    match State::from_number(flow.state).evictable_after(flow.forward.protocol) {
        Some(limit) if idle >= limit => true,
        _ => is_expired(flow, now),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::SctpHeader;

    fn flow(protocol: u8, state: State, last_seen: u32) -> Flow {
        let mut flow = Flow { epoch: 2, state: state as u32, last_seen, ..Flow::default() };
        flow.forward.protocol = protocol;
        flow
    }

    #[test]
    fn a_handshake_establishes_and_a_fin_closes() {
        let state = State::HalfOpen.after(Direction::Forward, tcp_flags::SYN);
        assert_eq!(state, State::HalfOpen);
        let state = state.after(Direction::Reply, tcp_flags::SYN | tcp_flags::ACK);
        assert_eq!(state, State::Answered, "so is what nobody has asked");
        assert_eq!(state.after(Direction::Forward, tcp_flags::SYN), State::Answered, "asked again");
        assert_eq!(state.after(Direction::Reply, tcp_flags::ACK), State::Answered);
        assert_eq!(state.after(Direction::Forward, tcp_flags::ACK), State::Established);
        assert_eq!(
            State::HalfOpen.after(Direction::Reply, tcp_flags::ACK),
            State::Established,
            "taken up midway"
        );
        assert_eq!(State::HalfOpen.after(Direction::Reply, 0), State::Established, "without a handshake");
    }

    #[test]
    fn a_connection_is_closed_when_both_sides_have_ended_it() {
        let fin = tcp_flags::FIN | tcp_flags::ACK;
        let ended = State::Established.after(Direction::Forward, fin);
        assert_eq!(ended, State::EndedForward);
        for still in [
            (Direction::Forward, fin),
            (Direction::Reply, tcp_flags::ACK),
            (Direction::Forward, tcp_flags::ACK),
        ] {
            assert_eq!(ended.after(still.0, still.1), ended);
        }
        assert_eq!(ended.after(Direction::Reply, fin), State::Closing);
        let ended = State::Established.after(Direction::Reply, fin);
        assert_eq!((ended, ended.after(Direction::Forward, fin)), (State::EndedReply, State::Closing));
        for state in [State::HalfOpen, State::Answered, State::Established, ended] {
            assert_eq!(state.after(Direction::Reply, tcp_flags::RST), State::Closing);
        }
        assert_eq!(State::Closing.after(Direction::Reply, tcp_flags::ACK), State::Closing);
        // the answer to who has asked and ended may take its time, and nobody gets the tuple meanwhile
        let waits = flow(Protocol::TCP, State::EndedForward, 100);
        assert!(
            !tuple_reusable(&waits, 100 + 3_600, true)
                && !is_evictable(&waits, 219)
                && is_evictable(&waits, 220)
        );
    }

    #[test]
    fn the_table_has_every_rule() {
        for number in 0..=7 {
            for direction in [Direction::Forward, Direction::Reply] {
                for flags in 0..=u8::MAX {
                    let after = State::from_number(number).after(direction, flags) as u32;
                    assert_eq!(State::number_after(number, direction, flags), after);
                }
            }
        }
    }

    #[test]
    fn established_tcp_never_gives_way_before_its_timeout() {
        let flow = flow(Protocol::TCP, State::Established, 1_000);
        assert!(!is_evictable(&flow, 1_000 + 7_999));
        assert!(is_evictable(&flow, 1_000 + 8_001));
    }

    #[test]
    fn an_association_outlives_its_heartbeats_and_ends_with_a_shutdown() {
        let header = |chunk| SctpHeader {
            src_port: 0,
            dst_port: 0,
            tag: 0,
            checksum: 0,
            chunk,
            chunk_flags: 0,
            chunk_len: 0,
        };
        let [data, init, init_ack, heartbeat, shutdown, shutdown_ack] =
            [0, 1, 2, 4, 7, 8].map(|chunk| header(chunk).flags());
        assert_eq!(init, tcp_flags::SYN, "begins one, as nothing else");
        let state = State::HalfOpen.after(Direction::Forward, init).after(Direction::Reply, init_ack);
        assert_eq!(state, State::Answered);
        assert_eq!(
            state.after(Direction::Forward, data).after(Direction::Reply, heartbeat),
            State::Established
        );
        assert!(!is_evictable(&flow(Protocol::SCTP, State::Established, 1_000), 1_000 + 210));
        assert!(is_evictable(&flow(Protocol::SCTP, State::Established, 1_000), 1_000 + 211));
        let state = State::Established.after(Direction::Reply, shutdown);
        assert_eq!(state.after(Direction::Forward, shutdown_ack), State::Closing);
    }

    #[test]
    fn half_open_goes_first() {
        assert!(is_evictable(&flow(Protocol::TCP, State::HalfOpen, 100), 102));
        assert!(is_evictable(&flow(Protocol::TCP, State::Answered, 100), 102));
        assert!(!is_evictable(&flow(Protocol::TCP, State::HalfOpen, 100), 101));
        assert!(is_evictable(&flow(Protocol::TCP, State::Closing, 100), 105));
        assert!(!is_evictable(&flow(Protocol::UDP, State::Established, 100), 129));
    }

    #[test]
    fn a_tuple_is_free_again_when_its_connection_is_past() {
        let closed = flow(Protocol::TCP, State::Closing, 100);
        assert_eq!([104, 105].map(|now| tuple_reusable(&closed, now, false)), [false, true]);
        assert_eq!([100, 101].map(|now| tuple_reusable(&closed, now, true)), [false, true]);
        // idle is not over
        assert!(!tuple_reusable(&flow(Protocol::UDP, State::Established, 100), 280, true));
        assert!(tuple_reusable(&flow(Protocol::UDP, State::Established, 100), 281, false));
        assert!(!tuple_reusable(&flow(Protocol::TCP, State::HalfOpen, 100), 160, true));
    }

    #[test]
    fn a_clock_read_before_the_last_packet_expires_nothing() {
        assert!(!is_expired(&flow(Protocol::UDP, State::HalfOpen, 100), 99));
    }
}
