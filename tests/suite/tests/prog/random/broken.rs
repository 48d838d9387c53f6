//! Packets that are not what they say: whatever bytes come, there is one outcome with a name, and what passes is what came.

use anyhow::Result;
use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    HOOKS, dropped, fail, packets,
    stage::Stage,
    try_all,
    wire::{self, Read},
};

/// A frame that ends within its IP header is refused by `BPF_PROG_TEST_RUN` itself (Linux 6.18).
const LEAST: usize = 54;

#[test]
fn no_packet_is_without_an_outcome_and_none_is_changed_by_chance() -> Result<()> {
    let stage = Stage::new()?;
    let edits = vec((12_usize..140, any::<u8>()), 0..5);
    let strategy =
        (packets::packet(), select(HOOKS.to_vec()), edits, prop_oneof![1 => Just(0_usize), 1 => LEAST..160]);
    try_all(1, &strategy, |(packet, hook, edits, cut)| {
        let mut frame = packet.build();
        for (at, byte) in edits {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        if cut > 0 {
            frame.truncate(cut);
        }
        // the run fails unless one counter of the hook's own has moved, by one
        let run = stage.run(hook, &frame).map_err(fail)?;
        if dropped(run.outcome) {
            return stage.pass_time().map_err(fail);
        }
        prop_assert_eq!(run.frame.len(), frame.len(), "{}", run.outcome);
        // what nobody can read, nobody has changed
        let may_change = match Read::frame(&frame) {
            Ok(read) if is_error(&frame, &read) => return stage.pass_time().map_err(fail),
            Ok(read) => read.changeable(),
            Err(_unreadable) => return stage.pass_time().map_err(fail),
        };
        let changed = wire::differences(&frame, &run.frame, &may_change);
        prop_assert!(changed.is_empty(), "{}: bytes at {changed:?} have changed", run.outcome);
        stage.pass_time().map_err(fail)
    });
    stage.check_flows()
}

/// A message carries a packet, whose addresses and ports change as well.
fn is_error(frame: &[u8], read: &Read) -> bool {
    [wire::ICMP, wire::ICMPV6].contains(&read.protocol)
        && frame.get(read.l4).is_some_and(|kind| ![0, 8, 128, 129].contains(kind))
}
