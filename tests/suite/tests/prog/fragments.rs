//! Fragments that overtake their first: they are held until it comes, and follow it. In a namespace of its own, where the copy of
//! the first goes that meets it again.

use anyhow::{Context as _, Result};
use dataplane_common::{abi::FRAGMENT_TIMEOUT_SECS, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Rig, World, at, ip, rig};
use nix::sched::{CloneFlags, unshare};

/// As the kernel runs a program without a device: the namespace's loopback.
fn loopback_up(family: Family) -> Result<(Rig, World)> {
    unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
    ip("link set lo up")?;
    rig(family)
}

/// The first of three fragments of a datagram of `id`, and the others, each of other bytes and length.
fn in_three(world: &World, id: u16) -> [Vec<u8>; 3] {
    let client = at(world.pod, 1_000);
    let piece = |fragment, payload: &[u8]| {
        Frame { fragment: Some(fragment), id, payload: payload.to_vec(), ..Frame::udp(client, world.service) }
            .build()
    };
    [piece((0, true), &[1; 40]), piece((6, true), &[2; 400]), piece((56, false), &[3; 9])]
}

fn from_pod(rig: &mut Rig, frame: &[u8]) -> Result<(Action, &'static str, Vec<u8>)> {
    let run = rig.run(HookId::FromPod, frame)?;
    Ok((run.action, run.outcome, run.frame))
}

#[test]
fn a_fragment_waits_for_its_first_and_follows_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = loopback_up(family)?;
        let [first, second, third] = in_three(&world, 7);
        for early in [&third, &second] {
            let (action, outcome, _) = from_pod(&mut rig, early)?;
            assert_eq!((action, outcome), (Action::Drop, "fragment_held"), "its bytes are kept");
        }
        // each time it comes, the first makes room for one of them: the one that came last
        for held in [&second, &third] {
            let (action, outcome, frame) = from_pod(&mut rig, &first)?;
            assert_eq!((action, outcome), (Action::Redirect, "fragment_again"));
            assert_eq!(&frame, held, "byte for byte");
        }
        for fragment in [&first, &second, &third] {
            let run = rig.run(HookId::FromPod, fragment)?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_wire"), "nobody is waited for");
            let backend = match world.wire_pod {
                std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
                std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            let dst = if family == Family::V4 { 30..34 } else { 38..54 };
            assert_eq!(run.frame[dst], backend[..]);
        }
        assert_eq!(rig.held()?, []);
    }
    Ok(())
}

#[test]
fn fragments_of_several_packets_are_told_apart() -> Result<()> {
    let (mut rig, world) = loopback_up(Family::V4)?;
    let ([first, later, _], [_, other, _]) = (in_three(&world, 7), in_three(&world, 8));
    from_pod(&mut rig, &other)?;
    assert_eq!(from_pod(&mut rig, &first)?.1, "to_wire", "what is held is another packet's");
    assert_eq!(from_pod(&mut rig, &later)?.1, "to_wire");
    assert_eq!(rig.held()?.len(), 1);
    Ok(())
}

/// An identification comes round again: what is left of an old packet is no part of the new one.
#[test]
fn what_is_too_old_is_not_waited_for() -> Result<()> {
    let (mut rig, world) = loopback_up(Family::V4)?;
    let [first, later, _] = in_three(&world, 7);
    from_pod(&mut rig, &later)?;
    rig.age_fragments(FRAGMENT_TIMEOUT_SECS + 1)?;
    let (action, outcome, frame) = from_pod(&mut rig, &first)?;
    assert_eq!(
        (action, outcome, frame),
        (Action::Redirect, "fragment_again", first.clone()),
        "begins anew alone"
    );
    assert_eq!(from_pod(&mut rig, &first)?.1, "to_wire");
    assert_eq!(rig.held()?, []);

    rig.age_fragments(FRAGMENT_TIMEOUT_SECS + 1)?;
    assert_eq!(from_pod(&mut rig, &later)?.1, "fragment_held", "the ports it would get are another packet's");
    Ok(())
}

#[test]
fn what_does_not_fit_is_dropped_by_name() -> Result<()> {
    let (mut rig, world) = loopback_up(Family::V4)?;
    let fragment = |payload| {
        let client = at(world.pod, 1_000);
        Frame { fragment: Some((2, false)), payload: vec![5; payload], ..Frame::udp(client, world.service) }
            .build()
    };
    assert_eq!(from_pod(&mut rig, &fragment(2_020))?.1, "fragment_held", "2,040 bytes with its header");
    let (action, outcome, _) = from_pod(&mut rig, &fragment(2_021))?;
    assert_eq!((action, outcome), (Action::Drop, "fragment_unknown"));
    Ok(())
}

/// On its way out a packet does not come in again: the host's stack sends its fragments in order.
#[test]
fn nothing_is_held_on_its_way_out() -> Result<()> {
    let (mut rig, world) = loopback_up(Family::V4)?;
    let later =
        Frame { fragment: Some((2, false)), ..Frame::udp(at(world.pod, 1_000), at(world.outside, 53)) };
    let run = rig.run(HookId::ToWire, &later.build())?;
    assert_eq!((run.action, run.outcome), (Action::Drop, "fragment_unknown"));
    Ok(())
}
