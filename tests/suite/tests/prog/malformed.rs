//! Malformed, unusual and fragmented packets: every one has a named outcome, none is delivered
//! wrongly.

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Rig, World, at, rig};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

/// A protocol without ports.
const GRE: u8 = 47;

fn from_pod(rig: &mut Rig, frame: &[u8]) -> Result<(Action, &'static str)> {
    let run = rig.run(HookId::FromPod, frame)?;
    Ok((run.action, run.outcome))
}

#[test]
fn ipv4_packets_with_wrong_lengths_are_dropped() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let good = Frame::udp(at(world.pod, 1), at(world.other_pod, 2)).build();
    let mut longer = good.clone();
    longer[16..18].copy_from_slice(&2_000_u16.to_be_bytes());
    assert_eq!(from_pod(&mut rig, &longer)?, (Action::Drop, "truncated"));
    let mut shorter = good.clone();
    shorter[16..18].copy_from_slice(&19_u16.to_be_bytes());
    assert_eq!(from_pod(&mut rig, &shorter)?, (Action::Drop, "bad_header"));
    for first in [0x44, 0x55, 0x65, 0x05] {
        let mut header = good.clone();
        header[14] = first;
        assert_eq!(from_pod(&mut rig, &header)?, (Action::Drop, "bad_header"), "first byte {first:#x}");
    }
    // bytes after the packet are padding of the link (RFC 894)
    let padded = [&good[..], &[0; 18]].concat();
    assert_eq!(from_pod(&mut rig, &padded)?.1, "to_pod");
    Ok(())
}

#[test]
fn ipv6_packets_with_wrong_lengths_are_dropped() -> Result<()> {
    let (mut rig, world) = rig(Family::V6)?;
    let good = Frame::udp(at(world.pod, 1), at(world.other_pod, 2)).build();
    let mut longer = good.clone();
    longer[18..20].copy_from_slice(&2_000_u16.to_be_bytes());
    assert_eq!(from_pod(&mut rig, &longer)?, (Action::Drop, "truncated"));
    let mut version = good.clone();
    version[14] = 0x40;
    assert_eq!(from_pod(&mut rig, &version)?, (Action::Drop, "bad_header"));
    Ok(())
}

#[test]
fn truncated_transport_header_is_dropped() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frame = Frame { protocol: Protocol::TCP, ..Frame::udp(at(world.pod, 1), world.service) };
        let header = if family == Family::V4 { 34 } else { 54 };
        let mut cut = frame.build();
        cut.truncate(header + 3);
        let len = cut.len();
        if family == Family::V4 {
            cut[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
        } else {
            cut[18..20].copy_from_slice(&3_u16.to_be_bytes());
        }
        assert_eq!(from_pod(&mut rig, &cut)?, (Action::Drop, "truncated"));
        assert!(rig.flows()?.is_empty());
    }
    Ok(())
}

#[test]
fn options_and_extension_headers_are_skipped() -> Result<()> {
    let (mut rig, v4) = rig(Family::V4)?;
    let frame = Frame { extra: vec![1, 1, 1, 0], ..Frame::udp(at(v4.pod, 1000), v4.service) };
    let run = rig.run(HookId::FromPod, &frame.build())?;
    assert_eq!(run.outcome, "to_wire");
    assert_eq!(run.packet().tuple(), (frame.src, at(v4.wire_pod, 8080)));

    let v6 = World::new(Family::V6);
    // hop-by-hop, then destination options, eight bytes each
    let chain = [Protocol::DESTINATION, 0, 1, 4, 0, 0, 0, 0, Protocol::UDP, 0, 1, 4, 0, 0, 0, 0];
    let frame = Frame {
        extra: chain.to_vec(),
        first_extension: Some(Protocol::HOP_BY_HOP),
        ..Frame::udp(at(v6.pod, 1000), v6.service)
    };
    let run = rig.run(HookId::FromPod, &frame.build())?;
    assert_eq!(run.outcome, "to_wire");
    assert_eq!(run.frame[54..70], chain, "extension headers are kept");
    assert_eq!(run.frame[70..74], [1000_u16.to_be_bytes(), 8080_u16.to_be_bytes()].concat());
    Ok(())
}

#[test]
fn packet_with_too_many_extension_headers_is_dropped() -> Result<()> {
    let (mut rig, world) = rig(Family::V6)?;
    let mut extra = [Protocol::DESTINATION, 0, 1, 4, 0, 0, 0, 0].repeat(8);
    extra[56] = Protocol::UDP;
    let frame = Frame {
        extra,
        first_extension: Some(Protocol::DESTINATION),
        ..Frame::udp(at(world.pod, 1), at(world.other_pod, 2))
    };
    assert_eq!(from_pod(&mut rig, &frame.build())?, (Action::Drop, "extension_headers"));
    Ok(())
}

#[test]
fn later_fragments_get_the_translation_of_the_first() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 1000);
        let later = Frame { fragment: Some((2, false)), ..Frame::udp(client, world.service) };
        let first =
            Frame { fragment: Some((0, true)), payload: vec![7; 8], ..Frame::udp(client, world.service) };
        let run = rig.run(HookId::FromPod, &first.build())?;
        assert_eq!(run.outcome, "to_wire");
        let run = rig.run(HookId::FromPod, &later.build())?;
        assert_eq!(run.outcome, "to_wire");
        let backend = match world.wire_pod {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let dst = if family == Family::V4 { 30..34 } else { 38..54 };
        assert_eq!(run.frame[dst], backend[..], "same destination as the first fragment");
        assert!(run.frame.ends_with(b"payload"), "its data is unchanged");

        // between pods ports are not needed
        let plain = Frame { fragment: Some((2, false)), ..Frame::udp(client, at(world.other_pod, 9)) };
        assert_eq!(from_pod(&mut rig, &plain.build())?.1, "to_pod");
    }
    Ok(())
}

#[test]
fn protocols_without_ports_are_routed_and_masqueraded() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let gre = Frame { protocol: GRE, ..Frame::udp(at(world.pod, 0), at(world.other_pod, 0)) };
        assert_eq!(from_pod(&mut rig, &gre.build())?.1, "to_pod");
        let out = Frame { protocol: GRE, ..Frame::udp(at(world.pod, 0), at(world.outside, 0)) };
        let run = rig.run(HookId::ToWire, &out.build())?;
        assert_eq!((run.outcome, run.packet().src), ("masqueraded", world.host));
    }
    Ok(())
}

/// Any bytes at any hook have exactly one counted outcome.
#[test]
fn arbitrary_bytes_have_exactly_one_outcome() -> Result<()> {
    let (rig, world) = rig(Family::V4)?;
    let rig = std::cell::RefCell::new(rig);
    let seeds = [
        Frame::udp(at(world.pod, 1), world.service).build(),
        Frame::tcp(at(world.pod, 1), at(world.outside, 2), 2).build(),
        Frame::ping(world.pod, world.outside, 3).build(),
        {
            let world = World::new(Family::V6);
            Frame::too_big(world.outside, world.pod, &Frame::udp(at(world.pod, 1), world.service).build())
                .build()
        },
    ];
    let hooks = [
        HookId::FromPod,
        HookId::ToPod,
        HookId::FromWire,
        HookId::ToWire,
        HookId::FromOverlay,
        HookId::ToOverlay,
    ];
    let mut runner = TestRunner::new(Config { cases: 2_000, failure_persistence: None, ..Config::default() });
    let edits = proptest::collection::vec((12_usize..90, any::<u8>()), 0..6);
    runner
        // BPF_PROG_TEST_RUN rejects a frame that ends within its IP header (Linux 6.18)
        .run(&(0..seeds.len(), 0..hooks.len(), edits, 54_usize..200), |(seed, hook, edits, cut)| {
            let mut frame = seeds[seed].clone();
            for (at, byte) in edits {
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            frame.truncate(cut);
            rig.borrow_mut()
                .run(hooks[hook], &frame)
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
            Ok(())
        })
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    rig.borrow_mut().flows()?;
    Ok(())
}
