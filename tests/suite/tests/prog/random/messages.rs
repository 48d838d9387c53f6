//! ICMP messages: those the programs make, and those about packets they have translated.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::reason::HookId;
use dataplane_testkit::prog::{Family, Frame, World};
use proptest::{prelude::*, test_runner::TestCaseError};

use super::{
    fail,
    packets::Packet,
    stage::{Became, Left, Stage},
    wire::{self, ICMP, ICMPV6, Read, SCTP, TCP, UDP},
};

/// What an error must carry of a transport header (RFC 792).
const LEAST: usize = 8;

/// A refusal: "port unreachable", from who was asked to who asked, about the very packet.
pub(crate) fn refusal(asked: &Read, frame: &[u8], message: &[u8]) -> Result<(), TestCaseError> {
    let read = Read::sound(message).map_err(fail)?;
    let code = if asked.src.is_ipv4() { [3, 3] } else { [1, 4] };
    prop_assert_eq!(&message[read.l4..read.l4 + 2], &code);
    prop_assert_eq!((read.src.ip(), read.dst.ip()), (asked.dst.ip(), asked.src.ip()));
    let quoted = &message[read.l4 + 8..read.end];
    prop_assert!(quoted.len() >= asked.l4 - asked.l3 + LEAST, "{} bytes", quoted.len());
    prop_assert_eq!(quoted, &frame[asked.l3..asked.l3 + quoted.len()]);
    Ok(())
}

/// Errors about a packet that was translated, from who got it and from a router on its way, reach who sent it, as errors
/// about what he sent.
pub(crate) fn about(
    stage: &Stage,
    packet: &Packet,
    asked: &Read,
    left: &Left,
    sent: &Read,
) -> Result<(), TestCaseError> {
    // what a process of the node answers with does not pass where the node sends messages by itself; and behind extension
    // headers nobody looks
    let is_met =
        [HookId::FromPod, HookId::FromWire, HookId::FromOverlay, HookId::XdpWire].contains(&left.answered_at);
    let is_plain = sent.src.is_ipv4() || sent.l4 == sent.l3 + 40;
    if !is_met || !is_plain || sent.end < sent.l4 + LEAST {
        return Ok(());
    }
    let router = World::new(packet.family).exempt;
    let kinds =
        if packet.family == Family::V4 { [(3, 3), (3, 4), (11, 0)] } else { [(1, 4), (2, 0), (3, 0)] };
    let lengths = [sent.l4 + LEAST, sent.end.min(sent.l4 + 28), sent.end];
    // no service has this protocol: it answers what the pod asked under its node's address, and nobody routes between the two
    let is_answer = left.answered_at == HookId::FromPod && ![TCP, UDP, SCTP].contains(&asked.protocol);
    let senders = if is_answer { &[sent.dst.ip()][..] } else { &[sent.dst.ip(), router, router] };
    for ((kind, end), from) in kinds.into_iter().zip(lengths).zip(senders.iter().copied()) {
        let mut message = error(from, sent.src.ip(), kind);
        message.payload = left.frame[sent.l3..end].to_vec();
        let message = message.build();
        let came = stage.follow(left.answered_at, &message, from, packet.family).map_err(fail)?;
        let Became::Passed(came) = came else { return Err(fail((kind, "an error about it", came))) };
        let read = Read::sound(&came.frame).map_err(|wrong| fail((wrong, kind, &came)))?;
        let expected = if from == sent.dst.ip() { asked.dst.ip() } else { from };
        prop_assert_eq!(
            (read.src.ip(), read.dst.ip()),
            (expected, asked.src.ip()),
            "{:?} {:?}",
            kind,
            came.outcomes
        );
        let about = read.carried(&came.frame).map_err(fail)?;
        prop_assert_eq!((about.src, about.dst), (asked.src, asked.dst), "{:?} is about", kind);
        // nothing else of what it carries has changed, its checksum aside
        let was = Read::frame(&message).and_then(|read| read.carried(&message)).map_err(fail)?;
        let outer = Read::frame(&message).map_err(fail)?;
        let may_change = [outer.changeable(), was.changeable()].concat();
        let changed = wire::differences(&message, &came.frame, &may_change);
        prop_assert!(changed.is_empty(), "{kind:?}: bytes at {changed:?} have changed");
    }
    Ok(())
}

fn error(from: IpAddr, to: IpAddr, icmp: (u8, u8)) -> Frame {
    let protocol = if from.is_ipv4() { ICMP } else { ICMPV6 };
    let frame = Frame::ping(from, to, 0);
    let (src, dst) = (SocketAddr::new(from, 0), SocketAddr::new(to, 0));
    Frame { icmp, protocol, src, dst, ..frame }
}
