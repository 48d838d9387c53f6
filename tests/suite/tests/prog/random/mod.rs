//! Packets at random through the programs, in packet order: what is translated on its way comes back as what was asked, and
//! what is not is left as it was, to the byte.
//!
//! What is expected is worked out from the packets alone, by a reader and checksums of their own ([`wire`]). More of them
//! with `DATAPLANE_FULL=1`.

mod broken;
mod driver;
mod fragments;
mod messages;
mod packets;
mod stage;
mod wire;

use std::{collections::BTreeMap, fmt::Debug, net::SocketAddr};

use anyhow::Result;
use dataplane_common::reason::{DropReason, HookId};
use dataplane_testkit::run;
use proptest::{
    prelude::*,
    test_runner::{TestCaseError, TestRunner},
};

use self::{
    packets::Packet,
    stage::{Became, Left, Stage},
    wire::{Read, UDP},
};

/// Longer by default than it takes to meet every kind of packet at every kind of service.
const CASES: u32 = 500;
/// So many more with `DATAPLANE_FULL=1`.
const MORE: u32 = 60;

/// Runs `test` on what a strategy makes, `share` of the usual number of times.
fn try_all<S: Strategy>(share: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>)
where
    S::Value: Debug,
{
    let cases = CASES / share * if run::is_full() { MORE } else { 1 };
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 400,
        ..ProptestConfig::default()
    };
    if let Err(error) = TestRunner::new(config).run(strategy, test) {
        panic!("{error}");
    }
}

fn fail(error: impl Debug) -> TestCaseError {
    TestCaseError::fail(format!("{error:?}"))
}

/// The packet ended, whether or not its sender hears of it.
fn dropped(outcome: &str) -> bool {
    DropReason::ALL.iter().any(|reason| reason.name() == outcome)
}

fn backwards(tuple: (SocketAddr, SocketAddr)) -> (SocketAddr, SocketAddr) {
    (tuple.1, tuple.0)
}

#[test]
fn what_is_translated_comes_back_as_it_was() -> Result<()> {
    let stage = Stage::new()?;
    let seen = std::cell::RefCell::new(BTreeMap::<String, u32>::new());
    try_all(1, &packets::packet(), |packet| {
        let frame = packet.build();
        let asked = Read::sound(&frame).map_err(fail)?;
        let became = stage.send(&packet, &frame).map_err(fail)?;
        let what = match &became {
            Became::Passed(left) => there_and_back(&stage, &packet, (&asked, &frame), left)?,
            Became::Refused(message) => messages::refusal(&asked, &frame, message).map(|()| "refused")?,
            Became::Dropped(reason) => reason,
        };
        *seen.borrow_mut().entry(format!("{:?} {what}", packet.hook)).or_default() += 1;
        stage.pass_time().map_err(fail)
    });
    stage.check_flows()?;
    // or the packets are not what they were meant to be
    let seen = seen.into_inner();
    for kind in [
        "FromPod translated",
        "FromWire translated",
        "ToWire translated",
        "FromOverlay translated",
        "FromPod refused",
        "FromPod as it was",
    ] {
        assert!(seen.get(kind).is_some_and(|count| *count > 3), "{kind}: {seen:#?}");
    }
    Ok(())
}

/// Looks at what a packet has become, and at what becomes of an answer.
fn there_and_back(
    stage: &Stage,
    packet: &Packet,
    (asked, frame): (&Read, &[u8]),
    left: &Left,
) -> Result<&'static str, TestCaseError> {
    let sent = Read::sound(&left.frame).map_err(|wrong| fail((wrong, left)))?;
    let translated = (sent.src, sent.dst) != (asked.src, asked.dst);
    let may_change = if translated { asked.changeable() } else { asked.worn() };
    let changed = wire::differences(frame, &left.frame, &may_change);
    prop_assert!(changed.is_empty(), "{:?}: bytes at {changed:?} have changed", left.outcomes);
    let (before, after) = (asked.checksum_of(frame), sent.checksum_of(&left.frame));
    let is_none = |field: Option<&[u8]>| asked.protocol == UDP && field.is_some_and(|field| field == [0, 0]);
    prop_assert_eq!(
        is_none(before),
        is_none(after),
        "a checksum that is none stays none, and no other becomes so"
    );
    if !translated {
        return Ok("as it was");
    }
    let answer = packet.reply(&sent);
    let back = stage.follow(left.answered_at, &answer, sent.dst.ip(), packet.family).map_err(fail)?;
    let Became::Passed(back) = back else {
        return Err(fail(format!("{sent:?} of {:?}: its answer: {back:?}", left.outcomes)));
    };
    let heard = Read::sound(&back.frame).map_err(|wrong| fail((wrong, &back)))?;
    prop_assert_eq!(
        (heard.src, heard.dst),
        backwards((asked.src, asked.dst)),
        "the answer at {:?} to what was {:?} on its way and {:?} back",
        left.answered_at,
        &left.outcomes,
        &back.outcomes
    );
    let answered = Read::frame(&answer).map_err(fail)?;
    let changed = wire::differences(&answer, &back.frame, &answered.changeable());
    prop_assert!(changed.is_empty(), "bytes of the answer at {changed:?} have changed");
    messages::about(stage, packet, asked, left, &sent)?;
    Ok("translated")
}

/// The sum of one packet in 65,536 is such that its checksum is 0, which UDP must not send: here every packet's is.
#[test]
fn a_checksum_that_comes_out_as_none_is_sent_as_the_other_zero() -> Result<()> {
    let stage = Stage::new()?;
    let made = std::cell::Cell::new(0);
    try_all(2, &packets::packet().prop_filter("is UDP", |packet| packet.protocol == UDP), |packet| {
        let mut frame = packet.build();
        let Became::Passed(left) = stage.send(&packet, &frame).map_err(fail)? else { return Ok(()) };
        let asked = Read::frame(&frame).map_err(fail)?;
        let sent = Read::sound(&left.frame).map_err(fail)?;
        if sent.src == asked.src && sent.dst == asked.dst || asked.end < asked.l4 + 10 {
            return Ok(());
        }
        // the translation of this tuple is known: what is missing in its sum goes into the data, which both have
        let data = asked.l4 + 8;
        let field = |frame: &[u8]| u16::from_be_bytes([frame[asked.l4 + 6], frame[asked.l4 + 7]]);
        if field(&frame) == 0 {
            return Ok(());
        }
        let old = u16::from_be_bytes([frame[data], frame[data + 1]]);
        let new = wire::sum(&[old.to_be_bytes(), field(&left.frame).to_be_bytes()].concat());
        let before =
            wire::sum(&[(!field(&frame)).to_be_bytes(), (!old).to_be_bytes(), new.to_be_bytes()].concat());
        frame[data..data + 2].copy_from_slice(&new.to_be_bytes());
        let own = if before == u16::MAX { u16::MAX } else { !before };
        frame[asked.l4 + 6..asked.l4 + 8].copy_from_slice(&own.to_be_bytes());
        Read::sound(&frame).map_err(fail)?;
        let Became::Passed(left) = stage.send(&packet, &frame).map_err(fail)? else {
            return Err(fail("it passed before"));
        };
        prop_assert_eq!(field(&left.frame), u16::MAX);
        Read::sound(&left.frame).map_err(fail)?;
        made.set(made.get() + 1);
        stage.pass_time().map_err(fail)
    });
    assert!(made.get() > 20, "{} packets", made.get());
    Ok(())
}

/// Hooks at which packets are translated, and the others.
const HOOKS: [HookId; 6] = [
    HookId::FromPod,
    HookId::ToPod,
    HookId::FromWire,
    HookId::ToWire,
    HookId::FromOverlay,
    HookId::ToOverlay,
];
