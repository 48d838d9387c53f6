//! Fragments that arrive before the first one: they are kept and follow it. In a separate
//! namespace, because a copy of the first fragment is sent to its loopback device.

use anyhow::{Context as _, Result};
use dataplane_common::{abi::FRAGMENT_TIMEOUT_SECS, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Rig, World, at, ip, rig};
use nix::sched::{CloneFlags, unshare};

/// A rig in a namespace whose loopback is up: the kernel's test runs use it as the device.
fn loopback_up(family: Family) -> Result<(Rig, World)> {
    unshare(CloneFlags::CLONE_NEWNET).context("create a network namespace")?;
    ip("link set lo up")?;
    rig(family)
}

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
        let (mut rig, world) = loopback_up(family)?;
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
    let (mut rig, world) = loopback_up(Family::V4)?;
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
    let (mut rig, world) = loopback_up(Family::V4)?;
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
    let (mut rig, world) = loopback_up(Family::V4)?;
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
    let (mut rig, world) = loopback_up(Family::V4)?;
    let later =
        Frame { fragment: Some((2, false)), ..Frame::udp(at(world.pod, 1_000), at(world.outside, 53)) };
    let run = rig.run(HookId::ToWire, &later.build())?;
    assert_eq!((run.action, run.outcome), (Action::Drop, "fragment_unknown"));
    Ok(())
}
