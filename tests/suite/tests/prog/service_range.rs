//! The range of cluster IPs (`ServiceCIDR`): packets to unassigned addresses of it are dropped.

use anyhow::Result;
use dataplane_common::{abi::RouteKind, net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Rig, World, at, rig};

/// A node with a route row for the range, and an unassigned address in it.
fn rig_with_range(family: Family) -> Result<(Rig, World, std::net::IpAddr)> {
    let (mut rig, world) = rig(family)?;
    let (bits, unassigned) = match family {
        Family::V4 => (16, "10.96.7.7"),
        Family::V6 => (108, "fd00:96::7:7"),
    };
    rig.route((world.service.ip(), bits), RouteKind::Services, None, 0)?;
    Ok((rig, world, unassigned.parse()?))
}

#[test]
fn packet_to_an_unassigned_cluster_ip_is_dropped_at_every_hook() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, unassigned) = rig_with_range(family)?;
        for (hook, client) in [
            (HookId::FromPod, world.pod),
            (HookId::FromWire, world.outside),
            (HookId::FromWire, world.wire_pod),
            (HookId::FromOverlay, world.overlay_pod),
            (HookId::ToWire, world.host),
        ] {
            for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
                let frame =
                    Frame { protocol, chunk: 1, ..Frame::tcp(at(client, 40_000), at(unassigned, 80), 0x02) };
                let run = rig.run(hook, &frame.build())?;
                assert_eq!((run.action, run.outcome), (Action::Drop, "no_service"), "{hook:?} {protocol}");
            }
        }
        assert!(rig.flows()?.is_empty(), "a dropped packet creates no flow");
    }
    Ok(())
}

/// A ping to a cluster IP has no receiver; without the range it would leave the node.
#[test]
fn ping_to_a_cluster_ip_is_dropped_as_service_protocol() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, unassigned) = rig_with_range(family)?;
        for (hook, client) in [(HookId::FromPod, world.pod), (HookId::ToWire, world.host)] {
            for address in [world.service.ip(), unassigned] {
                let run = rig.run(hook, &Frame::ping(client, address, 7).build())?;
                assert_eq!(
                    (run.action, run.outcome),
                    (Action::Drop, "service_protocol"),
                    "{hook:?} {address}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn services_in_the_range_are_translated_as_without_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, _) = rig_with_range(family)?;
        let client = at(world.pod, 40_000);
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, 0x02).build())?;
        assert_eq!(run.outcome, "to_wire");
        assert_eq!(run.packet().tuple(), (client, at(world.wire_pod, 8080)));
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.empty_service, 0x02).build())?;
        assert_eq!(
            (run.action, run.outcome),
            (Action::Redirect, "no_backend"),
            "rejected as without the range"
        );
        let client = at(world.outside, 40_000);
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, world.own_service, 0x02).build())?;
        assert_eq!((run.outcome, run.packet().dst), ("to_pod", world.pod));
    }
    Ok(())
}
