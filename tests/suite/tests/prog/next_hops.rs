//! Cached next hops: packets of a flow go where an earlier packet of the same second has gone,
//! until something that decides it changes.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{
    Action, Family, Frame, GATEWAY_MAC, HOST_MAC, MARK, Metadata, NODE_MAC, POD_MAC, Rig, Run, World, at,
    devices, ip, per_packet_udp, rig_with, uplink,
};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
const FIN_ACK: u8 = 0x11;

/// An established connection, and a packet of each direction.
struct Connection {
    request: Frame,
    reply: Frame,
    from: HookId,
    back: HookId,
}

impl Connection {
    /// Of a client, whose packets pass `from` and whose answers pass `back`.
    fn open(
        rig: &mut Rig,
        (from, client): (HookId, SocketAddr),
        (back, server): (HookId, SocketAddr),
    ) -> Result<Self> {
        let syn = rig.run(from, &Frame::tcp(client, server, SYN).build())?;
        let (masqueraded, backend) = syn.packet().tuple();
        rig.run(back, &Frame::tcp(backend, masqueraded, SYN_ACK).build())?;
        let request = Frame::tcp(client, server, ACK);
        rig.run(from, &request.build())?;
        Ok(Self { request, reply: Frame::tcp(backend, masqueraded, ACK), from, back })
    }
}

fn node(family: Family) -> Result<(Rig, World)> {
    let (mut rig, world) = rig_with(family, &per_packet_udp())?;
    uplink(&[family])?;
    rig.device(rig.ifindex, "172.18.0.2".parse()?, "fd00:18::2".parse()?)?;
    Ok((rig, world))
}

/// A pod's connection to a machine outside, masqueraded.
fn masqueraded(rig: &mut Rig, world: &World) -> Result<Connection> {
    let (client, server) = (at(world.pod, 40_000), at(world.outside, 443));
    Connection::open(rig, (HookId::FromPod, client), (HookId::FromWire, server))
}

/// Runs the packet until it is addressed to `mac`: only for a cached next hop does the program
/// write the link address; else the kernel does, behind it. The first packet of each second finds
/// it.
fn run_cached(rig: &mut Rig, hook: HookId, frame: &Frame, mac: [u8; 6]) -> Result<Run> {
    for _ in 0..10 {
        let run = rig.run(hook, &frame.build())?;
        if run.packet().eth_dst == mac {
            return Ok(run);
        }
    }
    anyhow::bail!("no packet went by a cached next hop")
}

#[test]
fn packets_of_both_directions_leave_as_they_do_without() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let connection = masqueraded(&mut rig, &world)?;
        rig.advance_generation()?;
        let first = rig.run(HookId::FromPod, &connection.request.build())?;
        let run = run_cached(&mut rig, HookId::FromPod, &connection.request, GATEWAY_MAC)?;
        assert_eq!((run.action, run.outcome, run.mark), (first.action, "to_outside", MARK));
        assert_eq!((run.packet().eth_src, run.packet().hop_limit), (HOST_MAC, first.packet().hop_limit));
        assert_eq!(run.packet().tuple(), first.packet().tuple());

        for packet in ["that finds the next hop", "that uses it"] {
            let run = rig.run(HookId::FromWire, &connection.reply.build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"), "{packet}");
            assert_eq!(run.packet().tuple(), (connection.request.dst, connection.request.src), "{packet}");
            assert_eq!((run.packet().eth_dst, run.packet().hop_limit), (POD_MAC, 63), "{packet}");
        }
    }
    Ok(())
}

#[test]
fn service_connections_between_nodes_cache_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let from = (HookId::FromPod, at(world.pod, 40_000));
        let connection = Connection::open(&mut rig, from, (HookId::FromWire, world.service))?;
        let run = run_cached(&mut rig, HookId::FromPod, &connection.request, NODE_MAC)?;
        assert_eq!((run.action, run.outcome, run.mark), (Action::Redirect, "to_wire", MARK));
        assert_eq!(run.packet().tuple(), (at(world.pod, 40_000), at(world.wire_pod, 8080)));
        assert_eq!(run.packet().hop_limit, 63);
    }
    Ok(())
}

#[test]
fn service_connections_through_the_tunnel_cache_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let frontend = at(world.service.ip(), 90);
        rig.service(frontend, Protocol::TCP, 200, &[at(world.overlay_pod, 8080)], 0)?;
        let from = (HookId::FromPod, at(world.pod, 40_000));
        let connection = Connection::open(&mut rig, from, (HookId::FromOverlay, frontend))?;
        let (pod, backend) = (at(world.pod, 40_000), at(world.overlay_pod, 8080));
        for _ in 0..3 {
            let run = rig.run(HookId::FromPod, &connection.request.build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_overlay"));
            assert_eq!((run.packet().tuple(), run.packet().hop_limit), ((pod, backend), 63));
            let run = rig.run(HookId::FromOverlay, &connection.reply.build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
            assert_eq!(run.packet().tuple(), (frontend, pod));
        }
    }
    Ok(())
}

#[test]
fn change_of_a_neighbour_takes_effect_with_the_generation() -> Result<()> {
    const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let connection = masqueraded(&mut rig, &world)?;
        let gateway = if family == Family::V4 { "172.18.0.254" } else { "fd00:18::fe" };
        let set = |mac: [u8; 6]| {
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            ip(&format!("neigh replace {gateway} lladdr {mac} nud permanent dev wire0"))
        };
        // a second may end between the change and the packet
        let mut is_cached = false;
        for _ in 0..5 {
            run_cached(&mut rig, HookId::FromPod, &connection.request, GATEWAY_MAC)?;
            set(OTHER_MAC)?;
            let run = rig.run(HookId::FromPod, &connection.request.build())?;
            is_cached |= run.packet().eth_dst == GATEWAY_MAC;
            set(GATEWAY_MAC)?;
            rig.advance_generation()?;
        }
        assert!(is_cached, "in the same second and generation");
        set(OTHER_MAC)?;
        rig.advance_generation()?;
        let run = rig.run(HookId::FromPod, &connection.request.build())?;
        assert_eq!(run.outcome, "to_outside");
        assert_ne!(run.packet().eth_dst, GATEWAY_MAC);
        run_cached(&mut rig, HookId::FromPod, &connection.request, OTHER_MAC)?;
    }
    Ok(())
}

/// Each change comes while a next hop is cached, and decides about the next packet.
#[test]
fn change_of_a_table_takes_effect_at_the_next_packet() -> Result<()> {
    type Change = fn(&mut Rig, &World) -> Result<()>;
    let changes: [(&str, Change, Action, &str); 3] = [
        (
            "the pod's device is down",
            |rig, world| rig.pod_down(world.pod, devices::PODS[0]),
            Action::Drop,
            "device_down",
        ),
        ("the pod is gone", |rig, world| rig.remove_endpoint(world.pod), Action::Drop, "no_endpoint"),
        (
            "the client's address is now a pod's",
            |rig, world| rig.pod(world.outside, devices::PODS[1], [2, 0, 0, 0, 0, 12]),
            Action::Drop,
            "source_is_local",
        ),
    ];
    for family in Family::BOTH {
        for (change, apply, action, outcome) in changes {
            let (mut rig, world) = node(family)?;
            let connection = masqueraded(&mut rig, &world)?;
            for _ in 0..3 {
                assert_eq!(rig.run(HookId::FromWire, &connection.reply.build())?.outcome, "to_pod");
            }
            apply(&mut rig, &world)?;
            let run = rig.run(HookId::FromWire, &connection.reply.build())?;
            assert_eq!((run.action, run.outcome), (action, outcome), "{change}");
        }
    }
    Ok(())
}

/// The source was proven for packets of one device.
#[test]
fn packet_of_another_device_does_not_use_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let connection = masqueraded(&mut rig, &world)?;
        let frame = connection.request.build();
        let metadata = rig.metadata(HookId::FromPod, &frame)?;
        run_cached(&mut rig, HookId::FromPod, &connection.request, GATEWAY_MAC)?;
        for (hook, ifindex, reason) in [
            (HookId::FromPod, devices::PODS[1], "source_not_owned"),
            (HookId::FromWire, rig.ifindex, "source_is_local"),
        ] {
            // a forged RST would shorten the flow's timeout
            let forged = Frame { tcp_flags: 0x04, ..connection.request.clone() }.build();
            let before = rig.flows()?;
            let run = rig.run_with(hook, &forged, Metadata { ifindex, ..metadata })?;
            assert_eq!((run.action, run.outcome), (Action::Drop, reason));
            assert_eq!(rig.flows()?, before);
        }
    }
    Ok(())
}

/// What depends on the packet is decided for each.
#[test]
fn packet_that_cannot_go_there_does_not_use_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let connection = masqueraded(&mut rig, &world)?;
        run_cached(&mut rig, HookId::FromPod, &connection.request, GATEWAY_MAC)?;
        let request = &connection.request;
        for (what, frame, outcome) in [
            ("its hop limit expires", Frame { hop_limit: 1, ..request.clone() }, "stack_outside"),
            (
                "it is larger than the MTU",
                Frame { payload: vec![7; 1_501], ..request.clone() },
                "stack_outside",
            ),
        ] {
            let run = rig.run(HookId::FromPod, &frame.build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, outcome), "{what}");
            assert_eq!(run.frame, frame.build(), "{what}");
        }
    }
    Ok(())
}

#[test]
fn flow_follows_the_state_of_a_connection_that_uses_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let connection = masqueraded(&mut rig, &world)?;
        run_cached(&mut rig, connection.from, &connection.request, GATEWAY_MAC)?;
        rig.run(connection.back, &connection.reply.build())?;
        for (hook, frame) in [(connection.from, &connection.request), (connection.back, &connection.reply)] {
            rig.run(hook, &Frame { tcp_flags: FIN_ACK, ..frame.clone() }.build())?;
        }
        let flow = rig.flows()?.pop().context("a flow")?;
        assert_eq!(flow.state, dataplane_common::flow::State::Closing as u32);
        // a new connection with the same ports is one
        let syn = Frame { tcp_flags: SYN, ..connection.request.clone() };
        rig.run(connection.from, &syn.build())?;
        let flow = rig.flow_of(connection.request.src, connection.request.dst, Protocol::TCP)?;
        assert_eq!(flow.state, dataplane_common::flow::State::HalfOpen as u32);
    }
    Ok(())
}

/// A datagram socket may talk for days.
#[test]
fn datagrams_leave_a_removed_backend_at_the_next_packet() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node(family)?;
        let request = Frame::udp(at(world.pod, 40_000), world.service);
        let (pod, backend) = rig.run(HookId::FromPod, &request.build())?.packet().tuple();
        rig.run(HookId::FromWire, &Frame::udp(backend, pod).build())?;
        run_cached(&mut rig, HookId::FromPod, &request, NODE_MAC)?;
        let slot = 210;
        rig.service(world.service, Protocol::UDP, slot, &[at(world.other_pod, 53)], 0)?;
        rig.raise_generation(world.backend())?;
        let run = rig.run(HookId::FromPod, &request.build())?;
        assert_eq!((run.outcome, run.packet().tuple().1), ("to_pod", at(world.other_pod, 53)));
    }
    Ok(())
}
