//! Life cycle of a flow: its state, its timeout, and which flows a full table evicts first.
//!
//! Pure rules, applied by the datapath and shown by the agent. TCP state follows from flags alone,
//! never from sequence numbers: an out-of-window packet is translated like any other. SCTP chunks
//! count as the corresponding TCP flags ([`SctpHeader::flags`](crate::net::SctpHeader::flags)).

use crate::{abi::Flow, net::Protocol};

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum State {
    /// No reply has been seen.
    HalfOpen = 1,
    /// Packets were seen in both directions; of a handshake, all three parts.
    Established = 2,
    /// Closed: both sides have sent a FIN.
    Closing = 3,
    /// A SYN was answered by a SYN-ACK that is not acknowledged yet: the client's address may be
    /// spoofed.
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
    /// From the number stored in a flow; an unknown one counts as half-open, which is evicted
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
        matches!(self, Self::Closing | Self::Reset | Self::ResetForward | Self::ResetReply)
    }

    /// The state after a packet in `direction` with these TCP flags (0 for protocols without a
    /// handshake).
    #[inline(always)]
    #[must_use]
    pub const fn after(self, direction: Direction, flags: u8) -> Self {
        if flags & tcp_flags::RST != 0 {
            return if matches!(self, Self::Closing) { self } else { Self::Reset };
        }
        let (opens, ends) = (flags & tcp_flags::SYN != 0, flags & tcp_flags::FIN != 0);
        match (self, direction) {
            (Self::Closing, _) => Self::Closing,
            (Self::Reset | Self::ResetForward | Self::ResetReply, _) if opens => self,
            (Self::Reset, Direction::Forward) => Self::ResetForward,
            (Self::Reset, Direction::Reply) => Self::ResetReply,
            (Self::ResetForward, Direction::Reply) | (Self::ResetReply, Direction::Forward) => {
                Self::Established.after(direction, flags)
            }
            (Self::EndedForward, Direction::Reply) | (Self::EndedReply, Direction::Forward) if ends => {
                Self::Closing
            }
            (Self::EndedForward | Self::EndedReply | Self::ResetForward | Self::ResetReply, _) => self,
            (_, Direction::Forward) if ends => Self::EndedForward,
            (_, Direction::Reply) if ends => Self::EndedReply,
            (Self::HalfOpen, Direction::Reply) if opens => Self::Answered,
            (Self::HalfOpen, Direction::Reply) => Self::Established,
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
            (Protocol::UDP, Self::Established) => 180,
            // as nf_conntrack: an idle association sends a heartbeat every 30 seconds (RFC 9260
            // §16, "HB.interval")
            (Protocol::SCTP, Self::Established) => 210,
            // closed, without a reply, or ICMP
            _ => 30,
        }
    }

    /// Seconds without a packet after which a full table may evict the flow; `None`: not before its
    /// timeout.
    #[inline(always)]
    const fn evictable_after(self, protocol: u8) -> Option<u32> {
        match (self, protocol) {
            (Self::HalfOpen | Self::Answered, _) => Some(2),
            (Self::Closing | Self::Reset | Self::ResetForward | Self::ResetReply, _) => Some(5),
            // a response may take a while, but half-closed connections that never close are common
            (Self::EndedForward | Self::EndedReply, _) => Some(120),
            (Self::Established, Protocol::TCP | Protocol::SCTP) => None,
            (Self::Established, _) => Some(30),
        }
    }
}

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

/// Whether another connection may take the reply tuple of `flow`: it has expired, or was closed so
/// long ago that no packet of it is in flight. `last_resort` shortens that time, for when no other
/// tuple was found.
#[inline(always)]
pub const fn tuple_reusable(flow: &Flow, now: u32, last_resort: bool) -> bool {
    let quiet_time = if last_resort { 1 } else { 5 };
    (State::from_number(flow.state).is_closed() && now.saturating_sub(flow.last_seen) >= quiet_time)
        || is_expired(flow, now)
}

/// Whether a new flow may take the slot of `flow`: the slot is unused, or the flow has expired, has
/// no complete handshake, is closing, or (of a protocol without connections) is idle.
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
    fn three_way_handshake_establishes_a_connection() {
        let state = State::HalfOpen.after(Direction::Forward, tcp_flags::SYN);
        assert_eq!(state, State::HalfOpen);
        let state = state.after(Direction::Reply, tcp_flags::SYN | tcp_flags::ACK);
        assert_eq!(state, State::Answered, "the client has not acknowledged: its address may be spoofed");
        assert_eq!(state.after(Direction::Forward, tcp_flags::SYN), State::Answered, "SYN retransmitted");
        assert_eq!(state.after(Direction::Reply, tcp_flags::ACK), State::Answered);
        assert_eq!(state.after(Direction::Forward, tcp_flags::ACK), State::Established);
        assert_eq!(
            State::HalfOpen.after(Direction::Reply, tcp_flags::ACK),
            State::Established,
            "picked up in mid-connection"
        );
        assert_eq!(
            State::HalfOpen.after(Direction::Reply, 0),
            State::Established,
            "a protocol without a handshake"
        );
    }

    #[test]
    fn connection_closes_after_a_fin_from_each_side() {
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
        for flags in [tcp_flags::ACK, tcp_flags::RST] {
            assert_eq!(State::Closing.after(Direction::Reply, flags), State::Closing);
        }
        // after a FIN from the client the response may take a while: the tuple stays in use
        let half_closed = flow(Protocol::TCP, State::EndedForward, 100);
        assert!(
            !tuple_reusable(&half_closed, 100 + 3_600, true)
                && !is_evictable(&half_closed, 219)
                && is_evictable(&half_closed, 220)
        );
    }

    #[test]
    fn reset_connection_is_established_again_by_packets_of_both_sides() {
        use Direction::{Forward, Reply};
        let ended = State::EndedReply;
        for state in [State::HalfOpen, State::Answered, State::Established, ended] {
            assert_eq!(state.after(Reply, tcp_flags::RST), State::Reset);
        }
        for (first, second) in [(Forward, Reply), (Reply, Forward)] {
            let one = State::Reset.after(first, tcp_flags::ACK);
            // what was on its way when a side reset the connection, and the answer to it
            assert_eq!(one.after(first, tcp_flags::ACK), one);
            assert_eq!(one.after(second, tcp_flags::RST), State::Reset);
            assert_eq!(one.after(second, tcp_flags::ACK), State::Established);
        }
        let fin = tcp_flags::FIN | tcp_flags::ACK;
        assert_eq!(State::ResetReply.after(Forward, fin), State::EndedForward);
        // a SYN is no sign of the old connection
        assert_eq!(State::Reset.after(Forward, tcp_flags::SYN), State::Reset);
        let reset = flow(Protocol::TCP, State::Reset, 100);
        assert!(!is_absent(&reset, 130) && is_absent(&reset, 131), "an RST alone shortens the timeout");
        assert!(!is_evictable(&reset, 104) && is_evictable(&reset, 105));
    }

    #[test]
    fn expired_flow_is_absent_but_for_an_established_connection() {
        assert!(!is_absent(&flow(Protocol::UDP, State::Established, 100), 280));
        assert!(is_absent(&flow(Protocol::UDP, State::Established, 100), 281));
        assert!(is_absent(&flow(Protocol::TCP, State::HalfOpen, 100), 161));
        let connection = flow(Protocol::TCP, State::Established, 100);
        assert!(is_expired(&connection, 100_000) && !is_absent(&connection, 100_000));
    }

    #[test]
    fn transition_table_matches_the_rules() {
        for number in 0..=15 {
            for direction in [Direction::Forward, Direction::Reply] {
                for flags in 0..=u8::MAX {
                    let after = State::from_number(number).after(direction, flags) as u32;
                    assert_eq!(State::next_raw(number, direction, flags), after);
                }
            }
        }
    }

    #[test]
    fn established_tcp_is_not_evicted_before_its_timeout() {
        let flow = flow(Protocol::TCP, State::Established, 1_000);
        assert!(!is_evictable(&flow, 1_000 + 7_999));
        assert!(is_evictable(&flow, 1_000 + 8_001));
    }

    #[test]
    fn sctp_association_outlives_heartbeats_and_closes_with_shutdown() {
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
        assert_eq!(init, tcp_flags::SYN, "only INIT opens an association");
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
    fn half_open_flows_are_evicted_first() {
        assert!(is_evictable(&flow(Protocol::TCP, State::HalfOpen, 100), 102));
        assert!(is_evictable(&flow(Protocol::TCP, State::Answered, 100), 102));
        assert!(!is_evictable(&flow(Protocol::TCP, State::HalfOpen, 100), 101));
        assert!(is_evictable(&flow(Protocol::TCP, State::Closing, 100), 105));
        assert!(!is_evictable(&flow(Protocol::UDP, State::Established, 100), 129));
    }

    #[test]
    fn reply_tuple_is_reusable_after_close_or_timeout() {
        let closed = flow(Protocol::TCP, State::Closing, 100);
        assert_eq!([104, 105].map(|now| tuple_reusable(&closed, now, false)), [false, true]);
        assert_eq!([100, 101].map(|now| tuple_reusable(&closed, now, true)), [false, true]);
        // an idle flow keeps its tuple until its timeout
        assert!(!tuple_reusable(&flow(Protocol::UDP, State::Established, 100), 280, true));
        assert!(tuple_reusable(&flow(Protocol::UDP, State::Established, 100), 281, false));
        assert!(!tuple_reusable(&flow(Protocol::TCP, State::HalfOpen, 100), 160, true));
    }

    #[test]
    fn clock_behind_the_last_packet_expires_nothing() {
        assert!(!is_expired(&flow(Protocol::UDP, State::HalfOpen, 100), 99));
    }
}
