//! Fragments: later ones get the translation of the first, and those that arrive before it are kept
//! and follow it.

use anyhow::Result;
use dataplane_common::{abi::FRAGMENT_TIMEOUT_SECS, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Rig, World, at, rig};

/// Three fragments of a datagram with this ID, each with other bytes and another length.
fn three_fragments(world: &World, id: u16) -> [Vec<u8>; 3] {
    let client = at(world.pod, 1_000);
    let fragment_of = |fragment, payload: &[u8]| {
        Frame { fragment: Some(fragment), id, payload: payload.to_vec(), ..Frame::udp(client, world.service) }
            .build()
    };
    [fragment_of((0, true), &[1; 40]), fragment_of((6, true), &[2; 400]), fragment_of((56, false), &[3; 9])]
}

fn from_pod(rig: &mut Rig, frame: &[u8]) -> Result<(Action, &'static str, Vec<u8>)> {
    let run = rig.run(HookId::FromPod, frame)?;
    Ok((run.action, run.outcome, run.frame))
}

#[test]
fn later_fragments_are_kept_until_the_first_arrives() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let [first, second, third] = three_fragments(&world, 7);
        for early in [&third, &second] {
            let (action, outcome, _) = from_pod(&mut rig, early)?;
            assert_eq!((action, outcome), (Action::Drop, "fragment_held"), "a copy is kept");
        }
        // each run of the first fragment releases one kept fragment, the last one first
        for kept in [&second, &third] {
            let (action, outcome, frame) = from_pod(&mut rig, &first)?;
            assert_eq!((action, outcome), (Action::Redirect, "fragment_again"));
            assert_eq!(&frame, kept, "unchanged");
        }
        for fragment in [&first, &second, &third] {
            let run = rig.run(HookId::FromPod, fragment)?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_wire"), "no fragment is waiting");
            let backend = match world.wire_pod {
                std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
                std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            let dst = if family == Family::V4 { 30..34 } else { 38..54 };
            assert_eq!(run.frame[dst], backend[..]);
        }
        assert_eq!(rig.pending_fragments()?, []);
    }
    Ok(())
}

#[test]
fn fragments_of_different_packets_are_kept_apart() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let ([first, later, _], [_, other, _]) = (three_fragments(&world, 7), three_fragments(&world, 8));
    from_pod(&mut rig, &other)?;
    assert_eq!(from_pod(&mut rig, &first)?.1, "to_wire", "the kept fragment belongs to another packet");
    assert_eq!(from_pod(&mut rig, &later)?.1, "to_wire");
    assert_eq!(rig.pending_fragments()?.len(), 1);
    Ok(())
}

/// Fragment IDs repeat: a fragment of an old packet does not belong to the new one.
#[test]
fn expired_fragments_are_ignored() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let [first, later, _] = three_fragments(&world, 7);
    from_pod(&mut rig, &later)?;
    rig.age_fragments(FRAGMENT_TIMEOUT_SECS + 1)?;
    let (action, outcome, frame) = from_pod(&mut rig, &first)?;
    assert_eq!(
        (action, outcome, frame),
        (Action::Redirect, "fragment_again", first.clone()),
        "the expired fragment is discarded"
    );
    assert_eq!(from_pod(&mut rig, &first)?.1, "to_wire");
    assert_eq!(rig.pending_fragments()?, []);

    rig.age_fragments(FRAGMENT_TIMEOUT_SECS + 1)?;
    assert_eq!(
        from_pod(&mut rig, &later)?.1,
        "fragment_held",
        "the known ports are those of an expired packet"
    );
    Ok(())
}

#[test]
fn fragment_above_the_size_limit_is_dropped() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let fragment = |payload| {
        let client = at(world.pod, 1_000);
        Frame { fragment: Some((2, false)), payload: vec![5; payload], ..Frame::udp(client, world.service) }
            .build()
    };
    assert_eq!(from_pod(&mut rig, &fragment(2_020))?.1, "fragment_held", "2,040 bytes with the IP header");
    let (action, outcome, _) = from_pod(&mut rig, &fragment(2_021))?;
    assert_eq!((action, outcome), (Action::Drop, "fragment_unknown"));
    Ok(())
}

/// A packet on egress cannot be injected again; the host's stack sends its fragments in order.
#[test]
fn fragments_are_not_kept_on_egress() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let later =
        Frame { fragment: Some((2, false)), ..Frame::udp(at(world.pod, 1_000), at(world.outside, 53)) };
    let run = rig.run(HookId::ToWire, &later.build())?;
    assert_eq!((run.action, run.outcome), (Action::Drop, "fragment_unknown"));
    Ok(())
}

/// A packet that re-uses the identification does not get the ports of the one before, whose
/// fragments have all arrived.
#[test]
fn reused_identification_does_not_take_the_ports_of_a_complete_packet() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let [first, second, third] = three_fragments(&world, 7);
        for fragment in [&first, &third, &second] {
            assert_eq!(from_pod(&mut rig, fragment)?.1, "to_wire");
        }
        assert_eq!(from_pod(&mut rig, &second)?.1, "fragment_held", "of the next packet");
    }
    Ok(())
}

/// Destination options may stand behind the fragment header (RFC 8200 §4.1): only the first
/// fragment has them, and with them the protocol.
#[test]
fn options_behind_the_fragment_header_do_not_hide_the_ports() -> Result<()> {
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    const UDP: u8 = 17;
    let (mut rig, world) = rig(Family::V6)?;
    let whole = Frame { payload: vec![9; 600], ..Frame::udp(at(world.pod, 1_000), world.service) }.build();
    let (headers, udp) = whole.split_at(54);
    let part = |offset: u16, more: bool, data: &[u8]| {
        let mut frame = headers.to_vec();
        frame[18..20].copy_from_slice(&(8 + data.len() as u16).to_be_bytes());
        frame[20] = FRAGMENT;
        frame.extend([DESTINATION, 0]);
        frame.extend((offset << 3 | u16::from(more)).to_be_bytes());
        frame.extend([1, 2, 3, 4]);
        frame.extend(data);
        frame
    };
    let options = [UDP, 0, 1, 4, 0, 0, 0, 0];
    let first = part(0, true, &[&options, &udp[..392]].concat());
    let later = part(50, false, &udp[392..]);
    for fragment in [&first, &later] {
        let (action, outcome, frame) = from_pod(&mut rig, fragment)?;
        assert_eq!((action, outcome), (Action::Redirect, "to_wire"));
        let std::net::IpAddr::V6(backend) = world.wire_pod else { unreachable!("an IPv6 world") };
        assert_eq!(frame[38..54], backend.octets(), "translated");
    }
    Ok(())
}
