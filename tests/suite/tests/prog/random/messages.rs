//! ICMP errors: those that the programs create, and those about translated packets.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::reason::HookId;
use dataplane_testkit::prog::{Family, Frame, World};
use proptest::{prelude::*, test_runner::TestCaseError};

use super::{
    decode::{self, Decoded, ICMP, ICMPV6},
    fail,
    node::{Outcome, Output, TestNode},
    packets::Packet,
};

/// Bytes of the transport header that an ICMP error must quote (RFC 792).
const MIN_QUOTED: usize = 8;

/// Checks an ICMP error that the node sends to the source of the packet, which it quotes: "port
/// unreachable" as from the destination, or "time exceeded" from the node itself.
pub(crate) fn check_rejection(original: &Decoded, frame: &[u8], message: &[u8]) -> Result<(), TestCaseError> {
    let read = Decoded::checked(message).map_err(fail)?;
    let is_v4 = original.src.is_ipv4();
    let world = World::new(if is_v4 { Family::V4 } else { Family::V6 });
    let hop_limit = frame[original.l3 + if is_v4 { 8 } else { 7 }];
    let (port_unreachable, time_exceeded) = if is_v4 { ([3, 3], [11, 0]) } else { ([1, 4], [3, 0]) };
    let (expected, sender) = if hop_limit <= 1 && message[read.l4..read.l4 + 2] == time_exceeded {
        (time_exceeded, world.host)
    } else {
        (port_unreachable, original.dst.ip())
    };
    prop_assert_eq!(&message[read.l4..read.l4 + 2], &expected);
    prop_assert_eq!((read.src.ip(), read.dst.ip()), (sender, original.src.ip()));
    let quoted = &message[read.l4 + 8..read.end];
    prop_assert!(quoted.len() >= original.l4 - original.l3 + MIN_QUOTED, "{} bytes", quoted.len());
    prop_assert_eq!(quoted, &frame[original.l3..original.l3 + quoted.len()]);
    Ok(())
}

/// Checks that ICMP errors about a translated packet, from its receiver and from a router, reach
/// its sender and quote the packet as sent.
pub(crate) fn check_errors_about(
    node: &TestNode,
    packet: &Packet,
    original: &Decoded,
    output: &Output,
    sent: &Decoded,
) -> Result<(), TestCaseError> {
    // not checked: replies of host processes, because errors from the host do not pass that hook,
    // and errors that quote IPv6 extension headers, which are not parsed
    let is_covered = [HookId::FromPod, HookId::FromWire, HookId::FromOverlay, HookId::XdpWire]
        .contains(&output.reply_hook);
    let is_plain = sent.src.is_ipv4() || sent.l4 == sent.l3 + 40;
    if !is_covered || !is_plain || sent.end < sent.l4 + MIN_QUOTED {
        return Ok(());
    }
    let router = World::new(packet.family).exempt;
    let kinds =
        if packet.family == Family::V4 { [(3, 3), (3, 4), (11, 0)] } else { [(1, 4), (2, 0), (3, 0)] };
    let lengths = [sent.l4 + MIN_QUOTED, sent.end.min(sent.l4 + 28), sent.end];
    // a pod is no router
    let is_local = output.reply_hook == HookId::FromPod;
    let senders = if is_local { &[sent.dst.ip()][..] } else { &[sent.dst.ip(), router, router] };
    for ((kind, end), from) in kinds.into_iter().zip(lengths).zip(senders.iter().copied()) {
        let mut message = error(from, sent.src.ip(), kind);
        message.payload = output.frame[sent.l3..end].to_vec();
        let message = message.build();
        let came = node.follow(output.reply_hook, &message, from, packet.family).map_err(fail)?;
        let Outcome::Forwarded(came) = came else { return Err(fail((kind, "ICMP error", came))) };
        let read = Decoded::checked(&came.frame).map_err(|wrong| fail((wrong, kind, &came)))?;
        let expected = if from == sent.dst.ip() { original.dst.ip() } else { from };
        prop_assert_eq!(
            (read.src.ip(), read.dst.ip()),
            (expected, original.src.ip()),
            "{:?} {:?}",
            kind,
            came.outcomes
        );
        let quoted = read.quoted(&came.frame).map_err(fail)?;
        prop_assert_eq!((quoted.src, quoted.dst), (original.src, original.dst), "{:?}: quoted packet", kind);
        // nothing else in the quoted packet changes, except its checksum
        let was = Decoded::frame(&message).and_then(|read| read.quoted(&message)).map_err(fail)?;
        let outer = Decoded::frame(&message).map_err(fail)?;
        let may_change = [outer.changeable(), was.changeable()].concat();
        let changed = decode::differences(&message, &came.frame, &may_change);
        prop_assert!(changed.is_empty(), "{kind:?}: bytes at {changed:?} changed");
    }
    Ok(())
}

fn error(from: IpAddr, to: IpAddr, icmp: (u8, u8)) -> Frame {
    let protocol = if from.is_ipv4() { ICMP } else { ICMPV6 };
    let frame = Frame::ping(from, to, 0);
    let (src, dst) = (SocketAddr::new(from, 0), SocketAddr::new(to, 0));
    Frame { icmp, protocol, src, dst, ..frame }
}
