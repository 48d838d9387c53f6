//! The driver's program before tc's: what it turns round comes back, and what it leaves goes the way it has begun.

use std::{cell::RefCell, collections::BTreeMap};

use anyhow::Result;
use dataplane_common::reason::HookId;
use proptest::prelude::*;

use super::{
    fail, messages, packets,
    stage::{Became, Stage},
    there_and_back, try_all,
    wire::Read,
};

#[test]
fn tc_goes_on_where_the_driver_has_begun() -> Result<()> {
    let stage = Stage::with_driver()?;
    let seen = RefCell::new(BTreeMap::<String, u32>::new());
    try_all(1, &packets::packet_at(&[HookId::XdpWire]), |packet| {
        let frame = packet.build();
        let asked = Read::sound(&frame).map_err(fail)?;
        let alone = stage.run(HookId::XdpWire, &frame).map_err(fail)?;
        // what has been chosen by now, whoever goes on with it
        let chosen = stage.translation(asked.src, asked.dst, asked.protocol);
        let became = stage.send(&packet, &frame).map_err(fail)?;
        let what = match &became {
            Became::Passed(left) => {
                let sent = Read::sound(&left.frame).map_err(|wrong| fail((wrong, left)))?;
                // at tc, past the driver
                let by_tc =
                    stage.follow(HookId::FromWire, &frame, packet.src().ip(), packet.family).map_err(fail)?;
                let Became::Passed(by_tc) = by_tc else { return Err(fail((left, by_tc))) };
                let again = Read::sound(&by_tc.frame).map_err(|wrong| fail((wrong, &by_tc)))?;
                prop_assert_eq!((again.src, again.dst), (sent.src, sent.dst), "{:?}", (left, by_tc));
                if let Some(chosen) = chosen.filter(|_| (sent.src, sent.dst) != (asked.src, asked.dst)) {
                    prop_assert_eq!((sent.src, sent.dst), chosen, "{:?}", left);
                }
                there_and_back(&stage, &packet, (&asked, &frame), left)?
            }
            Became::Refused(message) => messages::refusal(&asked, &frame, message).map(|()| "refused")?,
            Became::Dropped(reason) => {
                let by_tc = stage.run(HookId::FromWire, &frame).map_err(fail)?;
                prop_assert_eq!(*reason, by_tc.outcome, "dropped, whoever sees it");
                reason
            }
        };
        *seen.borrow_mut().entry(format!("{} {what}", alone.outcome)).or_default() += 1;
        stage.pass_time().map_err(fail)
    });
    stage.check_flows()?;
    // or the packets are not what they were meant to be
    let seen = seen.into_inner();
    for kind in ["to_wire translated", "left_to_tc translated", "left_to_tc as it was"] {
        assert!(seen.get(kind).is_some_and(|count| *count > 3), "{kind}: {seen:#?}");
    }
    Ok(())
}
