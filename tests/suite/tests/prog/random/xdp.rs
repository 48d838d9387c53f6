//! The XDP program before tc: replies to packets it transmits are translated back, and tc continues
//! with the translation of packets it passes on.

use std::{cell::RefCell, collections::BTreeMap};

use anyhow::Result;
use dataplane_common::reason::HookId;
use proptest::prelude::*;

use super::{
    check_all, check_round_trip,
    decode::Decoded,
    fail, messages,
    node::{Outcome, TestNode},
    packets,
};

#[test]
fn tc_uses_the_translation_that_xdp_selected() -> Result<()> {
    let node = TestNode::with_uplink()?;
    let seen = RefCell::new(BTreeMap::<String, u32>::new());
    check_all(1, &packets::packet_at(&[HookId::XdpWire]), |packet| {
        let frame = packet.build();
        let original = Decoded::checked(&frame).map_err(fail)?;
        let alone = node.run(HookId::XdpWire, &frame).map_err(fail)?;
        // the translation selected so far
        let chosen = node.translation(original.src, original.dst, original.protocol);
        let outcome = node.send(&packet, &frame).map_err(fail)?;
        let what = match &outcome {
            Outcome::Forwarded(output) => {
                let sent = Decoded::checked(&output.frame).map_err(|wrong| fail((wrong, output)))?;
                // directly at tc, without XDP
                let by_tc =
                    node.follow(HookId::FromWire, &frame, packet.src().ip(), packet.family).map_err(fail)?;
                let Outcome::Forwarded(by_tc) = by_tc else { return Err(fail((output, by_tc))) };
                let again = Decoded::checked(&by_tc.frame).map_err(|wrong| fail((wrong, &by_tc)))?;
                prop_assert_eq!((again.src, again.dst), (sent.src, sent.dst), "{:?}", (output, by_tc));
                if let Some(chosen) = chosen.filter(|_| (sent.src, sent.dst) != (original.src, original.dst))
                {
                    prop_assert_eq!((sent.src, sent.dst), chosen, "{:?}", output);
                }
                check_round_trip(&node, &packet, (&original, &frame), output)?
            }
            Outcome::Rejected(message) => {
                messages::check_rejection(&original, &frame, message).map(|()| "rejected")?
            }
            Outcome::Dropped(reason) => {
                let by_tc = node.run(HookId::FromWire, &frame).map_err(fail)?;
                prop_assert_eq!(*reason, by_tc.outcome, "both programs must drop it for the same reason");
                reason
            }
        };
        *seen.borrow_mut().entry(format!("{} {what}", alone.outcome)).or_default() += 1;
        node.pass_time().map_err(fail)
    });
    node.check_flows()?;
    // the packets must cover these kinds
    let seen = seen.into_inner();
    for kind in ["to_wire translated", "left_to_tc translated", "left_to_tc unchanged"] {
        assert!(seen.get(kind).is_some_and(|count| *count > 3), "{kind}: {seen:#?}");
    }
    Ok(())
}
