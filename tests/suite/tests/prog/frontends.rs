//! Services as clients outside and pods of the node use them: node ports, load balancer IPs,
//! traffic policies, source ranges, session affinity, DSR.

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
use dataplane_testkit::prog::{Action, Family, Frame, POD_MAC, Rig, World, at, rig};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const NODE_PORT: u16 = 30_080;
/// First slot of the services; their ID is one higher.
const SLOT: u32 = 200;

/// Whether the packet leaves the cluster. The outcome depends on the routes of the machine that
/// runs the test.
fn is_outside(outcome: &str) -> bool {
    ["to_outside", "stack_outside"].contains(&outcome)
}

/// A node port with these backends, for all clients, at the host's address.
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
fn node_port_with_a_backend_on_another_node_replaces_the_source() -> Result<()> {
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
            assert_eq!((between.ip(), dst), (world.host, backend), "with the node as source: {client}");
            assert!((61_000..=61_999).contains(&between.port()), "{between}");
            assert_eq!(rig.flows()?[0].flags, FlowFlags::SERVICE | FlowFlags::SOURCE | FlowFlags::OUTSIDE);

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

/// DSR at the addressed node: the packet is forwarded unchanged.
#[test]
fn dsr_forwards_the_unchanged_packet_to_the_backends_node() -> Result<()> {
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
            assert_eq!(
                state(&mut rig)?,
                State::Established as u32,
                "a client that sends ACK has received the SYN-ACK"
            );
            // the flow keeps its backend after a change of the service
            node_port(&mut rig, &world, &[at(world.other_pod, 8080)], direct)?;
            let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, 0x10).build())?;
            assert_eq!((run.outcome, run.packet().tuple()), (outcome, (client, frontend)));
            // a client on this node is translated without DSR
            let own = at(world.pod, 40_000);
            let run = rig.run(HookId::FromPod, &Frame::tcp(own, frontend, SYN).build())?;
            assert_eq!(run.packet().tuple(), (own, at(world.other_pod, 8080)));
        }
    }
    Ok(())
}

/// Nodes with different backends for a flow forward its packets to each other. A node whose service
/// has changed selects again for the next SYN.
#[test]
fn dsr_flow_without_reply_selects_a_backend_again() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let direct = ServiceFlags::HASH | ServiceFlags::DSR;
    let frontend = node_port(&mut rig, &world, &[at(world.wire_pod, 8080)], direct)?;
    let syn = Frame::tcp(at(world.outside, 40_000), frontend, SYN).build();
    assert_eq!(rig.run(HookId::FromWire, &syn)?.outcome, "to_wire");
    rig.service_with(frontend, Protocol::TCP, SLOT + 1, &[at(world.overlay_pod, 8080)], |key, service| {
        *key = key.at_node();
        service.flags = direct;
    })?;
    assert_eq!(rig.run(HookId::FromWire, &syn)?.outcome, "to_overlay");
    Ok(())
}

/// Loopback addresses belong to the host: packets from a device do not reach frontends there.
#[test]
fn frontend_at_a_loopback_address_is_not_reachable_from_devices() -> Result<()> {
    for (family, loopback) in [(Family::V4, "127.0.0.1"), (Family::V6, "::1")] {
        let (mut rig, world) = rig(family)?;
        let frontend = at(loopback.parse()?, 8080);
        rig.service(frontend, Protocol::TCP, SLOT, &[at(world.pod, 80)], 0)?;
        for (hook, client) in [(HookId::FromWire, world.outside), (HookId::FromPod, world.other_pod)] {
            let run = rig.run(hook, &Frame::tcp(at(client, 40_000), frontend, SYN).build())?;
            assert_eq!((run.action, run.outcome), (Action::Drop, "loopback_address"), "{}", hook.name());
        }
        assert_eq!(rig.flows()?, []);
    }
    Ok(())
}

/// Direct server return is for clients outside: a node refuses its own packets from another, and an
/// answer through the tunnel with the source of a third.
#[test]
fn dsr_is_not_used_for_a_client_in_the_cluster() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frontend = at(world.host, 30_080);
        rig.host_with_node_ports(world.host)?;
        rig.service_with(frontend, Protocol::TCP, 200, &[at(world.wire_pod, 8080)], |key, service| {
            *key = key.at_node();
            service.flags = ServiceFlags::DSR;
        })?;
        for (client, keeps_source) in
            [(world.outside, true), (world.wire_node, false), (world.overlay_pod, false)]
        {
            let run = rig.run(HookId::FromWire, &Frame::tcp(at(client, 40_000), frontend, SYN).build())?;
            assert_eq!(run.outcome, "to_wire");
            assert_eq!(run.packet().src == client, keeps_source, "{client}");
        }
    }
    Ok(())
}

/// DSR at the backend's node: the reply has the address of the addressed node as source.
#[test]
fn dsr_backend_replies_from_the_addressed_nodes_address() -> Result<()> {
    for family in Family::BOTH {
        for hook in [HookId::FromWire, HookId::FromOverlay] {
            let (mut rig, world) = rig(family)?;
            let backend = at(world.pod, 8080);
            node_port(&mut rig, &world, &[backend], 0)?;
            let asked = at(world.wire_node, NODE_PORT);
            let client = at(world.outside, 40_000);
            let request = Frame::tcp(client, asked, SYN).build();
            let run = rig.run(hook, &request)?;
            assert_eq!(run.frame, request, "without DSR it is not translated: {}", run.outcome);
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
fn backend_on_the_addressed_node_sees_the_client_address() -> Result<()> {
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
fn node_port_exists_only_at_node_port_addresses() -> Result<()> {
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
fn load_balancer_ip_on_no_device_is_translated() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (vip, backend) = (at(world.exempt, 443), at(world.wire_pod, 8443));
        rig.service(vip, Protocol::TCP, SLOT, &[backend], 0)?;
        let client = at(world.outside, 40_000);
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, vip, SYN).build())?;
        assert_eq!(run.outcome, "to_wire");
        let (between, dst) = run.packet().tuple();
        assert_eq!((between.ip(), dst), (world.host, backend));
        // other ports of the address are not ours
        let stray = Frame::tcp(client, at(world.exempt, 80), SYN).build();
        let run = rig.run(HookId::FromWire, &stray)?;
        assert_eq!((run.action, run.outcome, run.frame), (Action::Next, "stack_unmanaged", stray));
    }
    Ok(())
}

/// `externalTrafficPolicy: Local`: clients outside get backends of the node, clients on the node
/// get all.
#[test]
fn external_policy_local_applies_to_clients_outside_only() -> Result<()> {
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
        assert_eq!(
            (run.outcome, run.packet().tuple()),
            ("to_wire", (own, there)),
            "clients on the node get any backend"
        );

        outside(&mut rig, &[])?;
        let late = at(world.outside, 40_001);
        let run = rig.run(HookId::FromWire, &Frame::tcp(late, frontend, SYN).build())?;
        assert_eq!(
            (run.action, run.outcome),
            (Action::Drop, "no_local_backend"),
            "dropped without a message"
        );
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, 0x10).build())?;
        assert_eq!(run.packet().tuple(), (client, here), "an established connection continues");
    }
    Ok(())
}

#[test]
fn only_clients_in_source_ranges_are_accepted() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let vip = at(world.exempt, 443);
        rig.service(vip, Protocol::TCP, SLOT, &[at(world.other_pod, 8443)], ServiceFlags::SOURCE_RANGES)?;
        let send = |rig: &mut Rig, hook, client, port| -> Result<&'static str> {
            Ok(rig.run(hook, &Frame::tcp(at(client, port), vip, SYN).build())?.outcome)
        };
        // a range of another service
        rig.allow_source_range(SLOT + 2, (world.outside, if family == Family::V4 { 24 } else { 64 }))?;
        assert_eq!(send(&mut rig, HookId::FromWire, world.outside, 1)?, "source_range");
        assert_eq!(send(&mut rig, HookId::FromPod, world.pod, 1)?, "source_range", "pods too");
        rig.allow_source_range(SLOT + 1, (world.outside, if family == Family::V4 { 24 } else { 64 }))?;
        assert_eq!(send(&mut rig, HookId::FromWire, world.outside, 1)?, "to_pod");
        assert_eq!(send(&mut rig, HookId::FromPod, world.pod, 1)?, "source_range");
        rig.allow_source_range(SLOT + 1, (world.outside, 0))?;
        assert_eq!(send(&mut rig, HookId::FromPod, world.pod, 1)?, "to_pod", "a range of all clients");
    }
    Ok(())
}

/// A service with session affinity and these backends.
fn service_with_affinity(
    rig: &mut Rig,
    world: &World,
    backends: std::ops::Range<u16>,
    flags: u32,
) -> Result<SocketAddr> {
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
fn session_affinity_keeps_the_backend_until_it_is_removed() -> Result<()> {
    for family in Family::BOTH {
        for flags in [0, ServiceFlags::HASH] {
            let (mut rig, world) = rig(family)?;
            let frontend = service_with_affinity(&mut rig, &world, 0..30, flags)?;
            let mut port = 1_000;
            let mut ask = |rig: &mut Rig, client: IpAddr| -> Result<SocketAddr> {
                port += 1;
                let request = Frame::tcp(at(client, port), frontend, SYN).build();
                Ok(rig.run(HookId::FromPod, &request)?.packet().tuple().1)
            };
            for host in 1..=5 {
                rig.pod(neighbour(world.pod, host), 11, POD_MAC)?;
            }
            let first = ask(&mut rig, world.pod)?;
            for _ in 0..20 {
                assert_eq!(ask(&mut rig, world.pod)?, first);
            }
            // remove the client's backend
            let own = first.port() - 8_000;
            let rest = if own < 15 { own + 1..30 } else { 0..own };
            service_with_affinity(&mut rig, &world, rest, flags)?;
            let second = ask(&mut rig, world.pod)?;
            assert_ne!(second, first, "the backend was removed");
            for _ in 0..20 {
                assert_eq!(ask(&mut rig, world.pod)?, second);
            }
            // selection is per client: five clients do not all get the same of 30 backends
            let others: HashSet<_> =
                (1..=5).map(|host| ask(&mut rig, neighbour(world.pod, host))).collect::<Result<_>>()?;
            assert!(others.len() > 1, "{others:?}");
        }
    }
    Ok(())
}

/// Another address in the same range.
fn neighbour(ip: IpAddr, host: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            IpAddr::from([a, b, c, 100 + host])
        }
        IpAddr::V6(ip) => Ipv6Addr::from((u128::from(ip) & !0xffff) | u128::from(host)).into(),
    }
}
