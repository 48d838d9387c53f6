//! Malformed packets: any bytes have exactly one named outcome, and packets that pass change only
//! where translation changes them.

use anyhow::Result;
use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    HOOKS, check_all,
    decode::{self, Decoded},
    dropped, fail,
    node::TestNode,
    packets,
};

/// `BPF_PROG_TEST_RUN` rejects a frame that ends within its IP header (Linux 6.18).
const MIN_LENGTH: usize = 54;

#[test]
fn malformed_packets_have_one_outcome_and_unexpected_bytes_stay_unchanged() -> Result<()> {
    let node = TestNode::new()?;
    let edits = vec((12_usize..140, any::<u8>()), 0..5);
    let strategy = (
        packets::packet(),
        select(HOOKS.to_vec()),
        edits,
        prop_oneof![1 => Just(0_usize), 1 => MIN_LENGTH..160],
    );
    check_all(1, &strategy, |(packet, hook, edits, cut)| {
        let mut frame = packet.build();
        for (at, byte) in edits {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        if cut > 0 {
            frame.truncate(cut);
        }
        // fails unless exactly one counter of the hook increased, by one
        let run = node.run(hook, &frame).map_err(fail)?;
        // a buffered fragment of an earlier case may take the frame of its first one
        if dropped(run.outcome) || ["fragment_again", "neighbour_answered"].contains(&run.outcome) {
            return node.pass_time().map_err(fail);
        }
        prop_assert_eq!(run.frame.len(), frame.len(), "{}", run.outcome);
        // packets that cannot be decoded are not compared
        let may_change = match Decoded::frame(&frame) {
            Ok(decoded) if is_error(&frame, &decoded) => return node.pass_time().map_err(fail),
            Ok(decoded) => decoded.changeable(),
            Err(_unreadable) => return node.pass_time().map_err(fail),
        };
        let changed = decode::differences(&frame, &run.frame, &may_change);
        prop_assert!(changed.is_empty(), "{}: bytes at {changed:?} changed", run.outcome);
        node.pass_time().map_err(fail)
    });
    node.check_flows()
}

/// An ICMP error quotes a packet, whose addresses and ports change as well.
fn is_error(frame: &[u8], decoded: &Decoded) -> bool {
    [decode::ICMP, decode::ICMPV6].contains(&decoded.protocol)
        && frame.get(decoded.l4).is_some_and(|kind| ![0, 8, 128, 129].contains(kind))
}
