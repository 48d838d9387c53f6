//! Services as the outside and the node's own pods reach them: node ports, addresses of load balancers, policies, who may
//! ask, and who keeps whom.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use anyhow::Result;
use dataplane_common::{
    abi::{FlowFlags, Scope, ServiceFlags},
    flow::State,
    net::Protocol,
    reason::HookId,
};
use dataplane_testkit::prog::{Action, Family, Frame, Rig, World, at, rig};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const NODE_PORT: u16 = 30_080;
/// First slot of the services made here: its number less one.
const SLOT: u32 = 200;

/// Packets out of the cluster go by the routes of the machine that runs the test, which may have none.
fn is_outside(outcome: &str) -> bool {
    ["to_outside", "stack_outside"].contains(&outcome)
}

/// A node port with these backends, for everyone, at the address the host is known by.
fn node_port(rig: &mut Rig, world: &World, backends: &[SocketAddr], flags: u32) -> Result<SocketAddr> {
    rig.host_with_node_ports(world.host)?;
    let frontend = at(world.host, NODE_PORT);
    rig.service_with(frontend, Protocol::TCP, SLOT, backends, |key, service| {
        *key = key.at_node();
        service.flags = flags;
    })?;
    Ok(frontend)
}

#[test]
fn a_client_outside_reaches_a_backend_elsewhere_by_way_of_the_node() -> Result<()> {
    for family in Family::BOTH {
        for (hook, client) in [
            (HookId::FromWire, family_outside(family)),
            (HookId::FromWire, World::new(family).wire_pod),
            (HookId::FromOverlay, World::new(family).overlay_pod),
        ] {
            let (mut rig, world) = rig(family)?;
            let backend = at(world.wire_pod, 8080);
            let frontend = node_port(&mut rig, &world, &[backend], 0)?;
            let client = at(client, 40_000);
            let run = rig.run(hook, &Frame::tcp(client, frontend, SYN).build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_wire"), "{client}");
            let (between, dst) = run.packet().tuple();
            assert_eq!((between.ip(), dst), (world.host, backend), "under the node's address: {client}");
            assert!((61_000..=61_999).contains(&between.port()), "{between}");
            assert_eq!(rig.flows()?[0].flags, FlowFlags::SERVICE | FlowFlags::SOURCE);

            let run = rig.run(HookId::FromWire, &Frame::tcp(backend, between, SYN_ACK).build())?;
            assert_eq!(run.packet().tuple(), (frontend, client));
            match hook {
                _ if client.ip() == world.outside => assert!(is_outside(run.outcome), "{}", run.outcome),
                HookId::FromOverlay => assert_eq!(run.outcome, "to_overlay"),
                _ => assert_eq!(run.outcome, "to_wire"),
            }
        }
    }
    Ok(())
}

fn family_outside(family: Family) -> IpAddr {
    World::new(family).outside
}

/// Direct server return, at the node that is asked: the packet goes on as it came.
#[test]
fn a_direct_return_leaves_the_packet_to_the_backends_node() -> Result<()> {
    for family in Family::BOTH {
        for (backend, outcome) in
            [(World::new(family).wire_pod, "to_wire"), (World::new(family).overlay_pod, "to_overlay")]
        {
            let (mut rig, world) = rig(family)?;
            let direct = ServiceFlags::HASH | ServiceFlags::DSR;
            let frontend = node_port(&mut rig, &world, &[at(backend, 8080)], direct)?;
            let client = at(world.outside, 40_000);
            for flags in [SYN, 0x10, 0x18] {
                let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, flags).build())?;
                assert_eq!((run.action, run.outcome), (Action::Redirect, outcome));
                assert_eq!(run.packet().tuple(), (client, frontend));
            }
            let state =
                |rig: &mut Rig| -> Result<u32> { Ok(rig.flow_of(client, frontend, Protocol::TCP)?.state) };
            assert_eq!(state(&mut rig)?, State::Established as u32, "who acknowledges has heard the answer");
            // it stays with its backend, whatever the service has by now
            node_port(&mut rig, &world, &[at(world.other_pod, 8080)], direct)?;
            let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, 0x10).build())?;
            assert_eq!((run.outcome, run.packet().tuple()), (outcome, (client, frontend)));
            // who asks on this node is translated as ever
            let own = at(world.pod, 40_000);
            let run = rig.run(HookId::FromPod, &Frame::tcp(own, frontend, SYN).build())?;
            assert_eq!(run.packet().tuple(), (own, at(world.other_pod, 8080)));
        }
    }
    Ok(())
}

/// Nodes that do not agree on the backend hand its client's packets to each other. One that has learnt better looks again, with
/// the next packet that asks for the connection.
#[test]
fn a_direct_return_that_nobody_answers_is_chosen_anew() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let direct = ServiceFlags::HASH | ServiceFlags::DSR;
    let frontend = node_port(&mut rig, &world, &[at(world.wire_pod, 8080)], direct)?;
    let asks = Frame::tcp(at(world.outside, 40_000), frontend, SYN).build();
    assert_eq!(rig.run(HookId::FromWire, &asks)?.outcome, "to_wire");
    rig.service_with(frontend, Protocol::TCP, SLOT + 1, &[at(world.overlay_pod, 8080)], |key, service| {
        *key = key.at_node();
        service.flags = direct;
    })?;
    assert_eq!(rig.run(HookId::FromWire, &asks)?.outcome, "to_overlay");
    Ok(())
}

/// Loopback is the host's own: that a frame has come in says nothing of who may ask there.
#[test]
fn a_port_at_loopback_is_not_for_others() -> Result<()> {
    for (family, loopback) in [(Family::V4, "127.0.0.1"), (Family::V6, "::1")] {
        let (mut rig, world) = rig(family)?;
        let frontend = at(loopback.parse()?, 8080);
        rig.service(frontend, Protocol::TCP, SLOT, &[at(world.pod, 80)], 0)?;
        for (hook, client) in [(HookId::FromWire, world.outside), (HookId::FromPod, world.other_pod)] {
            let run = rig.run(hook, &Frame::tcp(at(client, 40_000), frontend, SYN).build())?;
            assert_eq!(run.action, Action::Next, "{}: {}", hook.name(), run.outcome);
            assert_eq!(run.packet().tuple().1, frontend);
        }
        assert_eq!(rig.flows()?, []);
    }
    Ok(())
}

/// And at the node of the backend: it answers in the name of the node that was asked.
#[test]
fn a_direct_return_is_answered_where_the_backend_is() -> Result<()> {
    for family in Family::BOTH {
        for hook in [HookId::FromWire, HookId::FromOverlay] {
            let (mut rig, world) = rig(family)?;
            let backend = at(world.pod, 8080);
            node_port(&mut rig, &world, &[backend], 0)?;
            let asked = at(world.wire_node, NODE_PORT);
            let client = at(world.outside, 40_000);
            let request = Frame::tcp(client, asked, SYN).build();
            let run = rig.run(hook, &request)?;
            assert_eq!(run.frame, request, "without direct return it is none of ours: {}", run.outcome);
            node_port(&mut rig, &world, &[backend], ServiceFlags::HASH | ServiceFlags::DSR)?;
            let run = rig.run(hook, &request)?;
            assert_eq!((run.outcome, run.packet().tuple()), ("to_pod", (client, backend)));
            let run = rig.run(HookId::FromPod, &Frame::tcp(backend, client, SYN_ACK).build())?;
            assert!(is_outside(run.outcome), "{}", run.outcome);
            assert_eq!(run.packet().tuple(), (asked, client));
        }
    }
    Ok(())
}

#[test]
fn a_backend_on_the_node_sees_who_asks() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let backend = at(world.pod, 8080);
        let frontend = node_port(&mut rig, &world, &[backend], 0)?;
        let client = at(world.outside, 40_000);
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, SYN).build())?;
        assert_eq!((run.outcome, run.packet().tuple()), ("to_pod", (client, backend)));
        let run = rig.run(HookId::FromPod, &Frame::tcp(backend, client, SYN_ACK).build())?;
        assert!(is_outside(run.outcome), "{}", run.outcome);
        assert_eq!(run.packet().tuple(), (frontend, client));
    }
    Ok(())
}

#[test]
fn a_node_port_is_only_where_node_ports_are() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        node_port(&mut rig, &world, &[at(world.pod, 8080)], 0)?;
        for elsewhere in [world.service.ip(), world.outside, world.wire_node, world.other_pod] {
            let request = Frame::tcp(at(world.pod, 40_000), at(elsewhere, NODE_PORT), SYN);
            let run = rig.run(HookId::FromPod, &request.build())?;
            assert_eq!(run.packet().tuple().1, at(elsewhere, NODE_PORT), "{elsewhere} {}", run.outcome);
        }
        let run = rig.run(
            HookId::FromPod,
            &Frame::tcp(at(world.other_pod, 1), at(world.host, NODE_PORT), SYN).build(),
        )?;
        assert_eq!(
            run.packet().tuple(),
            (at(world.other_pod, 1), at(world.pod, 8080)),
            "a pod keeps its address"
        );
    }
    Ok(())
}

#[test]
fn the_address_of_a_load_balancer_is_nobodys_and_answers() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (vip, backend) = (at(world.exempt, 443), at(world.wire_pod, 8443));
        rig.service(vip, Protocol::TCP, SLOT, &[backend], 0)?;
        let client = at(world.outside, 40_000);
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, vip, SYN).build())?;
        assert_eq!(run.outcome, "to_wire");
        let (between, dst) = run.packet().tuple();
        assert_eq!((between.ip(), dst), (world.host, backend));
        // what is not asked here is other machines' business
        let stray = Frame::tcp(client, at(world.exempt, 80), SYN).build();
        let run = rig.run(HookId::FromWire, &stray)?;
        assert_eq!((run.action, run.outcome, run.frame), (Action::Next, "stack_unmanaged", stray));
    }
    Ok(())
}

/// With `externalTrafficPolicy: Local`: backends of the node for the others, all for those on the node.
#[test]
fn a_local_policy_is_for_those_who_come_from_outside() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (here, there) = (at(world.pod, 8080), at(world.wire_pod, 8080));
        let frontend = node_port(&mut rig, &world, &[there], ServiceFlags::OUTSIDE)?;
        let outside = |rig: &mut Rig, backends: &[SocketAddr]| {
            rig.service_with(frontend, Protocol::TCP, SLOT + 10, backends, |key, service| {
                *key = key.at_node();
                key.scope = Scope::Outside as u8;
                service.id = SLOT + 1;
                service.flags = ServiceFlags::LOCAL;
            })
        };
        outside(&mut rig, &[here])?;
        let client = at(world.outside, 40_000);
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, SYN).build())?;
        assert_eq!((run.outcome, run.packet().tuple()), ("to_pod", (client, here)));
        let own = at(world.other_pod, 40_000);
        let run = rig.run(HookId::FromPod, &Frame::tcp(own, frontend, SYN).build())?;
        assert_eq!((run.outcome, run.packet().tuple()), ("to_wire", (own, there)), "the short circuit");

        outside(&mut rig, &[])?;
        let late = at(world.outside, 40_001);
        let run = rig.run(HookId::FromWire, &Frame::tcp(late, frontend, SYN).build())?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "no_local_backend"), "in silence");
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, 0x10).build())?;
        assert_eq!(run.packet().tuple(), (client, here), "a connection that is there goes on");
    }
    Ok(())
}

#[test]
fn only_source_ranges_may_ask() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let vip = at(world.exempt, 443);
        rig.service(vip, Protocol::TCP, SLOT, &[at(world.other_pod, 8443)], ServiceFlags::SOURCE_RANGES)?;
        let asks = |rig: &mut Rig, hook, client, port| -> Result<&'static str> {
            Ok(rig.run(hook, &Frame::tcp(at(client, port), vip, SYN).build())?.outcome)
        };
        // of another service
        rig.allow(SLOT + 2, (world.outside, if family == Family::V4 { 24 } else { 64 }))?;
        assert_eq!(asks(&mut rig, HookId::FromWire, world.outside, 1)?, "source_range");
        assert_eq!(asks(&mut rig, HookId::FromPod, world.pod, 1)?, "source_range", "pods too");
        rig.allow(SLOT + 1, (world.outside, if family == Family::V4 { 24 } else { 64 }))?;
        assert_eq!(asks(&mut rig, HookId::FromWire, world.outside, 1)?, "to_pod");
        assert_eq!(asks(&mut rig, HookId::FromPod, world.pod, 1)?, "source_range");
        rig.allow(SLOT + 1, (world.outside, 0))?;
        assert_eq!(asks(&mut rig, HookId::FromPod, world.pod, 1)?, "to_pod", "a range of everybody");
    }
    Ok(())
}

/// Backends of a service with affinity, and who gets which.
fn affine(rig: &mut Rig, world: &World, backends: std::ops::Range<u16>, flags: u32) -> Result<SocketAddr> {
    let frontend = at(world.service.ip(), 8_000);
    let all: Vec<_> = (8_000..8_030).map(|port| at(world.wire_pod, port)).collect();
    rig.service_with(frontend, Protocol::TCP, SLOT, &all, |_, service| {
        service.first_slot = SLOT + u32::from(backends.start);
        service.count = u32::from(backends.end - backends.start);
        service.affinity_timeout = 10_800;
        service.flags = flags;
    })?;
    Ok(frontend)
}

#[test]
fn a_client_with_affinity_keeps_its_backend_as_long_as_the_service_has_it() -> Result<()> {
    for family in Family::BOTH {
        for flags in [0, ServiceFlags::HASH] {
            let (mut rig, world) = rig(family)?;
            let frontend = affine(&mut rig, &world, 0..30, flags)?;
            let mut port = 1_000;
            let mut ask = |rig: &mut Rig, client: IpAddr| -> Result<SocketAddr> {
                port += 1;
                let request = Frame::tcp(at(client, port), frontend, SYN).build();
                Ok(rig.run(HookId::FromPod, &request)?.packet().tuple().1)
            };
            let first = ask(&mut rig, world.pod)?;
            for _ in 0..20 {
                assert_eq!(ask(&mut rig, world.pod)?, first);
            }
            // all but the one it has
            let own = first.port() - 8_000;
            let rest = if own < 15 { own + 1..30 } else { 0..own };
            affine(&mut rig, &world, rest, flags)?;
            let second = ask(&mut rig, world.pod)?;
            assert_ne!(second, first, "the service has it no more");
            for _ in 0..20 {
                assert_eq!(ask(&mut rig, world.pod)?, second);
            }
            // another client is another choice: of five, not all choose the same of so many
            let others: HashSet<_> =
                (1..=5).map(|host| ask(&mut rig, neighbour(world.pod, host))).collect::<Result<_>>()?;
            assert!(others.len() > 1, "{others:?}");
        }
    }
    Ok(())
}

/// Another address beside this one.
fn neighbour(ip: IpAddr, host: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            IpAddr::from([a, b, c, 100 + host])
        }
        IpAddr::V6(ip) => Ipv6Addr::from((u128::from(ip) & !0xffff) | u128::from(host)).into(),
    }
}
