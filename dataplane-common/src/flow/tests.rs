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
    let picked_up = State::HalfOpen.after(Direction::Reply, tcp_flags::ACK);
    assert_eq!(picked_up, State::Answered, "picked up in mid-connection");
    assert_eq!(picked_up.after(Direction::Forward, tcp_flags::ACK), State::Established);
}

#[test]
fn connection_closes_after_a_fin_from_each_side() {
    let fin = tcp_flags::FIN | tcp_flags::ACK;
    let ended = State::Established.after(Direction::Forward, fin);
    assert_eq!(ended, State::EndedForward);
    for still in
        [(Direction::Forward, fin), (Direction::Reply, tcp_flags::ACK), (Direction::Forward, tcp_flags::ACK)]
    {
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
    let reusable =
        |now, need| tuple_reusable(&half_closed, SlotClass::of(&half_closed, now), now, need, true);
    assert!(!reusable(100 + 3_600, Need::Little) && !reusable(219, Need::Last) && reusable(220, Need::Great));
}

#[test]
fn reset_connection_is_established_again_by_packets_of_both_sides() {
    use Direction::{Forward, Reply};
    let ended = State::EndedReply;
    for state in [State::Established, ended, State::EndedForward] {
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
    assert_eq!([104, 105].map(|now| SlotClass::of(&reset, now)), [SlotClass::Kept, SlotClass::Idle]);
}

/// A server refuses the connections of a flood, too.
#[test]
fn refused_connection_stays_unconfirmed() {
    use Direction::{Forward, Reply};
    for state in [State::HalfOpen, State::Answered, State::Refused] {
        for direction in [Forward, Reply] {
            assert_eq!(state.after(direction, tcp_flags::RST), State::Refused);
        }
    }
    let fin = tcp_flags::FIN | tcp_flags::ACK;
    // nobody answers forged packets
    for state in [State::HalfOpen, State::Refused] {
        for flags in [tcp_flags::SYN, tcp_flags::ACK, tcp_flags::FIN, fin] {
            assert_eq!(state.after(Forward, flags), state);
        }
    }
    // the RST was forged
    assert_eq!(State::Refused.after(Reply, tcp_flags::SYN | tcp_flags::ACK), State::Refused);
    let answered = State::Refused.after(Reply, tcp_flags::ACK);
    assert_eq!((answered, answered.after(Forward, tcp_flags::ACK)), (State::Answered, State::Established));
    let mut refused = flow(Protocol::TCP, State::Refused, 100);
    let class = |flow: &Flow| [100, 104, 105, 131].map(|now| SlotClass::of(flow, now));
    let (inside, idle) = (SlotClass::UnconfirmedInside, SlotClass::Idle);
    assert_eq!(class(&refused), [inside, inside, idle, SlotClass::Free]);
    refused.flags = FlowFlags::OUTSIDE;
    let outside = SlotClass::UnconfirmedOutside;
    assert_eq!(class(&refused), [outside, outside, outside, SlotClass::Free]);
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
    assert_eq!(SlotClass::of(&flow, 1_000 + 8_000), SlotClass::Kept);
    // while there are free slots it lives on
    assert_eq!(SlotClass::of(&flow, 1_000 + 8_001), SlotClass::Idle);
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
    assert_eq!(state.after(Direction::Forward, data).after(Direction::Reply, heartbeat), State::Established);
    let association = flow(Protocol::SCTP, State::Established, 1_000);
    assert_eq!(
        [210, 211].map(|idle| SlotClass::of(&association, 1_000 + idle)),
        [SlotClass::Kept, SlotClass::Free]
    );
    let state = State::Established.after(Direction::Reply, shutdown);
    assert_eq!(state.after(Direction::Forward, shutdown_ack), State::Closing);
}

#[test]
fn slots_of_unconfirmed_and_idle_flows_are_given_up() {
    let class = |protocol, state, idle: u32| SlotClass::of(&flow(protocol, state, 100), 100 + idle);
    for state in [State::HalfOpen, State::Answered] {
        for protocol in [Protocol::TCP, Protocol::UDP] {
            let mut flow = flow(protocol, state, 100);
            assert_eq!(SlotClass::of(&flow, 100), SlotClass::UnconfirmedInside);
            flow.flags = FlowFlags::OUTSIDE;
            assert_eq!(SlotClass::of(&flow, 100), SlotClass::UnconfirmedOutside);
            assert_eq!(SlotClass::of(&flow, 300), SlotClass::Free);
        }
    }
    let (tcp, udp) = (Protocol::TCP, Protocol::UDP);
    for (protocol, state, kept) in [
        (tcp, State::Closing, 4),
        (tcp, State::Reset, 4),
        (tcp, State::EndedForward, 119),
        (tcp, State::EndedReply, 119),
        // RFC 4787, REQ-5
        (udp, State::Established, 119),
    ] {
        assert_eq!(class(protocol, state, kept), SlotClass::Kept, "{state:?}");
        assert_eq!(class(protocol, state, kept + 1), SlotClass::Idle, "{state:?}");
    }
    assert_eq!(class(udp, State::Established, 181), SlotClass::Free);
    assert_eq!(SlotClass::of(&Flow::default(), 100), SlotClass::Free, "never used");
    let written = Flow { epoch: 3, ..flow(udp, State::HalfOpen, 0) };
    assert_eq!(SlotClass::of(&written, 100), SlotClass::Kept, "being written");
}

#[test]
fn flow_is_established_by_its_second_packet_forward() {
    use Direction::{Forward, Reply};
    let answered = State::HalfOpen.after(Forward, 0).after(Reply, 0);
    assert_eq!((answered, answered.after(Reply, 0)), (State::Answered, State::Answered));
    assert_eq!(answered.after(Forward, 0), State::Established);
    assert_eq!(answered.timeout(Protocol::UDP), State::Established.timeout(Protocol::UDP));
}

#[test]
fn reply_tuple_is_reusable_after_close_or_timeout() {
    let closed = flow(Protocol::TCP, State::Closing, 100);
    let reusable = |flow: &Flow, now, need| tuple_reusable(flow, SlotClass::of(flow, now), now, need, true);
    assert_eq!([160, 161].map(|now| reusable(&closed, now, Need::Least)), [false, true]);
    assert_eq!([104, 105].map(|now| reusable(&closed, now, Need::Little)), [false, true]);
    assert_eq!([100, 101].map(|now| reusable(&closed, now, Need::Great)), [false, true]);
    let udp = flow(Protocol::UDP, State::Established, 100);
    for need in [Need::Least, Need::Little] {
        assert_eq!([280, 281].map(|now| reusable(&udp, now, need)), [false, true]);
    }
    // RFC 4787, REQ-5
    assert_eq!([219, 220].map(|now| reusable(&udp, now, Need::Last)), [false, true]);
    let established = flow(Protocol::TCP, State::Established, 100);
    assert!(!reusable(&established, 8_100, Need::Last));
}

#[test]
fn reply_tuple_of_an_unconfirmed_flow_is_reusable_as_a_last_resort() {
    let mut flow = flow(Protocol::TCP, State::HalfOpen, 100);
    let reusable =
        |flow: &Flow, now, need, outside| tuple_reusable(flow, SlotClass::of(flow, now), now, need, outside);
    assert!(!reusable(&flow, 130, Need::Last, true), "a pod's, for a client outside");
    assert_eq!([101, 102].map(|now| reusable(&flow, now, Need::Last, false)), [false, true]);
    assert!(!reusable(&flow, 130, Need::Great, false), "there may be an answer yet");
    flow.state = State::Answered as u32;
    assert_eq!([109, 110].map(|now| reusable(&flow, now, Need::Great, false)), [false, true]);
    flow.flags = FlowFlags::OUTSIDE;
    assert!(!reusable(&flow, 100, Need::Great, true) && reusable(&flow, 100, Need::Last, true));
    assert!(reusable(&flow, 101, Need::Great, true) && !reusable(&flow, 130, Need::Little, true));
}

#[test]
fn clock_behind_the_last_packet_expires_nothing() {
    assert!(!is_expired(&flow(Protocol::UDP, State::HalfOpen, 100), 99));
}
