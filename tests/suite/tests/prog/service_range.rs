//! Where cluster IPs come from (`ServiceCIDR`): what no service has goes nowhere.

use anyhow::Result;
use dataplane_common::{abi::RouteKind, net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Rig, World, at, rig};

/// A node that knows the range, and an address of it that no service has.
fn ranged(family: Family) -> Result<(Rig, World, std::net::IpAddr)> {
    let (mut rig, world) = rig(family)?;
    let (bits, nobodys) = match family {
        Family::V4 => (16, "10.96.7.7"),
        Family::V6 => (108, "fd00:96::7:7"),
    };
    rig.route((world.service.ip(), bits), RouteKind::Services, None, 0)?;
    Ok((rig, world, nobodys.parse()?))
}

#[test]
fn an_address_that_no_service_has_is_dropped_whoever_asks() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, nobodys) = ranged(family)?;
        for (hook, client) in [
            (HookId::FromPod, world.pod),
            (HookId::FromWire, world.outside),
            (HookId::FromWire, world.wire_pod),
            (HookId::FromOverlay, world.overlay_pod),
            (HookId::ToWire, world.host),
        ] {
            for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
                let frame =
                    Frame { protocol, chunk: 1, ..Frame::tcp(at(client, 40_000), at(nobodys, 80), 0x02) };
                let run = rig.run(hook, &frame.build())?;
                assert_eq!((run.action, run.outcome), (Action::Drop, "no_service"), "{hook:?} {protocol}");
            }
        }
        assert!(rig.flows()?.is_empty(), "no flow for what goes nowhere");
    }
    Ok(())
}

/// Nobody answers a ping to a service; without the range it would leave the node.
#[test]
fn a_ping_to_a_service_is_dropped_by_name() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, nobodys) = ranged(family)?;
        for (hook, client) in [(HookId::FromPod, world.pod), (HookId::ToWire, world.host)] {
            for address in [world.service.ip(), nobodys] {
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
fn services_of_the_range_are_what_they_were() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, _) = ranged(family)?;
        let client = at(world.pod, 40_000);
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, 0x02).build())?;
        assert_eq!(run.outcome, "to_wire");
        assert_eq!(run.packet().tuple(), (client, at(world.wire_pod, 8080)));
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.empty_service, 0x02).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "no_backend"), "refused, as before");
        let client = at(world.outside, 40_000);
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, world.own_service, 0x02).build())?;
        assert_eq!((run.outcome, run.packet().dst), ("to_pod", world.pod));
    }
    Ok(())
}
