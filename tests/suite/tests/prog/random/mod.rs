//! Random packets through the programs, in packet order: a reply to a translated packet is
//! translated back, and packets that are not translated stay unchanged, byte for byte.
//!
//! Expectations are derived from the packets alone, with a separate decoder and checksums
//! ([`decode`]). `DATAPLANE_FULL=1` runs more packets.

mod broken;
mod decode;
mod fragments;
mod messages;
mod node;
mod packets;
mod xdp;

use std::{collections::BTreeMap, fmt::Debug, net::SocketAddr};

use anyhow::Result;
use dataplane_common::reason::{DropReason, HookId};
use dataplane_testkit::run;
use proptest::{
    prelude::*,
    test_runner::{TestCaseError, TestRunner},
};

use self::{
    decode::{Decoded, UDP},
    node::{Outcome, Output, TestNode},
    packets::Packet,
};

/// Number of packets: enough for every kind of packet to every kind of service.
const CASES: u32 = 500;
/// Factor with `DATAPLANE_FULL=1`.
const FULL_FACTOR: u32 = 60;

/// Runs `test` on values of a strategy, a fraction (1/`share`) of the usual number of times.
fn check_all<S: Strategy>(share: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>)
where
    S::Value: Debug,
{
    let cases = CASES / share * if run::is_full() { FULL_FACTOR } else { 1 };
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

/// Whether the outcome is a drop reason, with or without an ICMP error.
fn dropped(outcome: &str) -> bool {
    DropReason::ALL.iter().any(|reason| reason.name() == outcome)
}

fn reversed(tuple: (SocketAddr, SocketAddr)) -> (SocketAddr, SocketAddr) {
    (tuple.1, tuple.0)
}

#[test]
fn reply_to_a_translated_packet_is_translated_back() -> Result<()> {
    let node = TestNode::new()?;
    let seen = std::cell::RefCell::new(BTreeMap::<String, u32>::new());
    check_all(1, &packets::packet(), |packet| {
        let frame = packet.build();
        let original = Decoded::checked(&frame).map_err(fail)?;
        let outcome = node.send(&packet, &frame).map_err(fail)?;
        let what = match &outcome {
            Outcome::Forwarded(output) => check_round_trip(&node, &packet, (&original, &frame), output)?,
            Outcome::Rejected(message) => {
                messages::check_rejection(&original, &frame, message).map(|()| "rejected")?
            }
            Outcome::Dropped(reason) => reason,
        };
        *seen.borrow_mut().entry(format!("{:?} {what}", packet.hook)).or_default() += 1;
        node.pass_time().map_err(fail)
    });
    node.check_flows()?;
    // the packets must cover these kinds
    let seen = seen.into_inner();
    for kind in [
        "FromPod translated",
        "FromWire translated",
        "ToWire translated",
        "FromOverlay translated",
        "FromPod rejected",
        "FromPod unchanged",
    ] {
        assert!(seen.get(kind).is_some_and(|count| *count > 3), "{kind}: {seen:#?}");
    }
    Ok(())
}

/// Checks an output packet, and a reply to it.
fn check_round_trip(
    node: &TestNode,
    packet: &Packet,
    (original, frame): (&Decoded, &[u8]),
    output: &Output,
) -> Result<&'static str, TestCaseError> {
    let sent = Decoded::checked(&output.frame).map_err(|wrong| fail((wrong, output)))?;
    let translated = (sent.src, sent.dst) != (original.src, original.dst);
    let may_change = if translated { original.changeable() } else { original.changed_by_forwarding() };
    let changed = decode::differences(frame, &output.frame, &may_change);
    prop_assert!(changed.is_empty(), "{:?}: bytes at {changed:?} changed", output.outcomes);
    let (before, after) = (original.checksum_of(frame), sent.checksum_of(&output.frame));
    let is_none =
        |field: Option<&[u8]>| original.protocol == UDP && field.is_some_and(|field| field == [0, 0]);
    prop_assert_eq!(
        is_none(before),
        is_none(after),
        "a missing checksum must stay zero, and a computed one must not become zero"
    );
    if !translated {
        return Ok("unchanged");
    }
    // the stack answers instead of forwarding it
    if output.outcomes.contains(&"stack_ttl_expired") {
        return Ok("expired");
    }
    let reply = packet.reply(&sent);
    let back = node.follow(output.reply_hook, &reply, sent.dst.ip(), packet.family).map_err(fail)?;
    let Outcome::Forwarded(back) = back else {
        return Err(fail(format!("{sent:?} of {:?}: its reply: {back:?}", output.outcomes)));
    };
    let returned = Decoded::checked(&back.frame).map_err(|wrong| fail((wrong, &back)))?;
    prop_assert_eq!(
        (returned.src, returned.dst),
        reversed((original.src, original.dst)),
        "reply at {:?}; outcomes {:?}, of the reply {:?}",
        output.reply_hook,
        &output.outcomes,
        &back.outcomes
    );
    let reply_fields = Decoded::frame(&reply).map_err(fail)?;
    let changed = decode::differences(&reply, &back.frame, &reply_fields.changeable());
    prop_assert!(changed.is_empty(), "bytes of the reply at {changed:?} changed");
    messages::check_errors_about(node, packet, original, output, &sent)?;
    Ok("translated")
}

/// For one packet in 65,536 the computed checksum is 0, which UDP sends as 0xffff: here for every
/// packet.
#[test]
fn computed_udp_checksum_of_zero_is_sent_as_ffff() -> Result<()> {
    let node = TestNode::new()?;
    let checked = std::cell::Cell::new(0);
    check_all(2, &packets::packet().prop_filter("is UDP", |packet| packet.protocol == UDP), |packet| {
        let mut frame = packet.build();
        let Outcome::Forwarded(output) = node.send(&packet, &frame).map_err(fail)? else { return Ok(()) };
        let original = Decoded::frame(&frame).map_err(fail)?;
        let sent = Decoded::checked(&output.frame).map_err(fail)?;
        if sent.src == original.src && sent.dst == original.dst || original.end < original.l4 + 10 {
            return Ok(());
        }
        // the translation of this tuple is known: adjust the data so that the checksum after it is
        // 0
        let data = original.l4 + 8;
        let field = |frame: &[u8]| u16::from_be_bytes([frame[original.l4 + 6], frame[original.l4 + 7]]);
        if field(&frame) == 0 {
            return Ok(());
        }
        let old = u16::from_be_bytes([frame[data], frame[data + 1]]);
        let new = decode::sum(&[old.to_be_bytes(), field(&output.frame).to_be_bytes()].concat());
        let before =
            decode::sum(&[(!field(&frame)).to_be_bytes(), (!old).to_be_bytes(), new.to_be_bytes()].concat());
        frame[data..data + 2].copy_from_slice(&new.to_be_bytes());
        let own = if before == u16::MAX { u16::MAX } else { !before };
        frame[original.l4 + 6..original.l4 + 8].copy_from_slice(&own.to_be_bytes());
        Decoded::checked(&frame).map_err(fail)?;
        let Outcome::Forwarded(output) = node.send(&packet, &frame).map_err(fail)? else {
            return Err(fail("the packet passed before"));
        };
        prop_assert_eq!(field(&output.frame), u16::MAX);
        Decoded::checked(&output.frame).map_err(fail)?;
        checked.set(checked.get() + 1);
        node.pass_time().map_err(fail)
    });
    assert!(checked.get() > 20, "{} packets", checked.get());
    Ok(())
}

/// All hooks of devices.
const HOOKS: [HookId; 6] = [
    HookId::FromPod,
    HookId::ToPod,
    HookId::FromWire,
    HookId::ToWire,
    HookId::FromOverlay,
    HookId::ToOverlay,
];
