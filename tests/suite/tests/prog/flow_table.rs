//! Which flow a new one replaces when the flow table is full, and that a free slot is found
//! wherever it is.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::Result;
use dataplane_common::{
    abi::{FlowFlags, NodeConfig, Port},
    flow::State,
    net::Protocol,
    reason::HookId,
};
use dataplane_testkit::prog::{
    FLOWS, Family, Frame, Rig, World, at, per_packet_udp, rig_with, stay_on_one_cpu,
};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const NODE_PORT: u16 = 30_080;

/// A node with a node port, whose backend is a pod of another node.
fn node_with_port(family: Family) -> Result<(Rig, World)> {
    node_with_port_and(family, FLOWS)
}

/// With ports enough for every slot.
fn node_with_port_and(family: Family, flow_slots: u32) -> Result<(Rig, World)> {
    let snat_first = Port::new(50_000);
    let (mut rig, world) = rig_with(family, &NodeConfig { flow_slots, snat_first, ..per_packet_udp() })?;
    rig.host_with_node_ports(world.host)?;
    let backends = [at(world.wire_pod, 8_080)];
    rig.service_with(at(world.host, NODE_PORT), Protocol::TCP, 100, &backends, |key, _| {
        *key = key.at_node();
    })?;
    rig.service(world.service, Protocol::UDP, 110, &[at(world.wire_pod, 53)], 0)?;
    Ok((rig, world))
}

/// A handshake of a client with a service. Returns the client as the backend sees it.
fn connect(rig: &mut Rig, hook: HookId, client: SocketAddr, service: SocketAddr) -> Result<SocketAddr> {
    let run = rig.run(hook, &Frame::tcp(client, service, SYN).build())?;
    let (between, backend) = run.packet().tuple();
    let run = rig.run(HookId::FromWire, &Frame::tcp(backend, between, SYN_ACK).build())?;
    assert_eq!(run.packet().tuple(), (service, client), "{client}");
    let run = rig.run(hook, &Frame::tcp(client, service, ACK).build())?;
    assert_eq!(run.packet().tuple(), (between, backend), "{client}");
    Ok(between)
}

/// A pod's datagram to the service, the answer, and another datagram.
fn exchange(rig: &mut Rig, world: &World, client: SocketAddr) -> Result<()> {
    for _ in 0..2 {
        let run = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        assert_eq!(run.packet().tuple(), (client, at(world.wire_pod, 53)), "{client}");
        answer(rig, world, client)?;
    }
    Ok(())
}

fn answer(rig: &mut Rig, world: &World, client: SocketAddr) -> Result<()> {
    let run = rig.run(HookId::FromWire, &Frame::udp(at(world.wire_pod, 53), client).build())?;
    assert_eq!(run.packet().tuple(), (world.service, client), "{client}");
    Ok(())
}

fn age(rig: &mut Rig, seconds: u32, is_aged: impl Fn(u16) -> bool) -> Result<()> {
    rig.age_flows(|flow| {
        if is_aged(flow.forward.src_port.get()) {
            flow.last_seen = flow.last_seen.saturating_sub(seconds);
        }
    })
}

/// SYNs with forged sources, ten times as many as the table has slots. The server answers them.
#[test]
fn flood_from_outside_refuses_nobody() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = node_with_port(family)?;
        let node_port = at(world.host, NODE_PORT);
        let mut held = Vec::new();
        for port in 1..=4 {
            held.push((connect(&mut rig, HookId::FromPod, at(world.pod, port), world.service)?, port));
        }
        let mut honest = 0;
        for number in 0..10 * FLOWS as u16 {
            let forged = at(world.outside, 10_000 + number);
            let run = rig.run(HookId::FromWire, &Frame::tcp(forged, node_port, SYN).build())?;
            assert_eq!(run.outcome, "to_wire", "flood {number}");
            if number % 2 == 0 {
                let (between, backend) = run.packet().tuple();
                rig.run(HookId::FromWire, &Frame::tcp(backend, between, SYN_ACK).build())?;
            }
            if number % 32 == 0 {
                // a client between whose packets the flood goes on
                honest = number;
                rig.run(HookId::FromWire, &Frame::tcp(at(world.outside, 5), node_port, SYN).build())?;
                // pods: a connection to the outside, and a question to the cluster's DNS
                let out = Frame::tcp(at(world.pod, 20_000 + number), at(world.outside, 443), SYN);
                assert_eq!(rig.run(HookId::ToWire, &out.build())?.outcome, "masqueraded", "{number}");
                let question = Frame::udp(at(world.pod, 30_000 + number), world.service);
                let run = rig.run(HookId::FromPod, &question.build())?;
                assert_eq!(run.packet().dst, world.wire_pod, "{number}");
            } else if number % 32 == 8 {
                let client = at(world.pod, 30_000 + honest);
                answer(&mut rig, &world, client)?;
            }
            if number % 64 == 24 {
                connect(&mut rig, HookId::FromWire, at(world.outside, 1_000 + number), node_port)?;
            }
        }
        for (client, port) in held {
            let run =
                rig.run(HookId::FromWire, &Frame::tcp(at(world.wire_pod, 8_080), client, ACK).build())?;
            assert_eq!(
                run.packet().tuple(),
                (world.service, at(world.pod, port)),
                "an established connection"
            );
        }
        let confirmed = rig.flows()?.iter().filter(|flow| flow.state == State::Established as u32).count();
        assert_eq!(confirmed, 4 + 10, "every honest client");
    }
    Ok(())
}

/// The server answers forged packets with an RST, or not at all: nothing of it confirms a client.
#[test]
fn flood_that_the_server_refuses_gives_way() -> Result<()> {
    const FIN: u8 = 0x01;
    const RST_ACK: u8 = 0x14;
    for family in Family::BOTH {
        for is_refused in [true, false] {
            let (mut rig, world) = node_with_port(family)?;
            let node_port = at(world.host, NODE_PORT);
            for number in 0..FLOWS as u16 {
                let forged = at(world.outside, 10_000 + number);
                let run = rig.run(HookId::FromWire, &Frame::tcp(forged, node_port, SYN).build())?;
                let (between, backend) = run.packet().tuple();
                if is_refused {
                    rig.run(HookId::FromWire, &Frame::tcp(backend, between, RST_ACK).build())?;
                } else {
                    rig.run(HookId::FromWire, &Frame::tcp(forged, node_port, FIN).build())?;
                }
            }
            for port in 1..=20 {
                connect(&mut rig, HookId::FromPod, at(world.pod, port), world.service)?;
                connect(&mut rig, HookId::FromWire, at(world.outside, port), node_port)?;
            }
        }
    }
    Ok(())
}

/// A client's handshake goes on while the flood replaces half the table. On one CPU: each uses up a
/// block of its own, so with two the order is exact only to 64 slots.
#[test]
fn handshake_outlives_half_a_table_of_flood() -> Result<()> {
    const SLOTS: u32 = 1_024;
    stay_on_one_cpu()?;
    let (mut rig, world) = node_with_port_and(Family::V4, SLOTS)?;
    let node_port = at(world.host, NODE_PORT);
    let mut number = 0;
    let mut flood = |rig: &mut Rig| -> Result<()> {
        for _ in 0..SLOTS / 2 {
            number += 1;
            rig.run(
                HookId::FromWire,
                &Frame::tcp(at(world.outside, 10_000 + number), node_port, SYN).build(),
            )?;
        }
        Ok(())
    };
    flood(&mut rig)?;
    flood(&mut rig)?;
    for client in 1..=10 {
        let client = at(world.outside, client);
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, node_port, SYN).build())?;
        let (between, backend) = run.packet().tuple();
        assert_eq!(backend, at(world.wire_pod, 8_080));
        flood(&mut rig)?;
        let run = rig.run(HookId::FromWire, &Frame::tcp(backend, between, SYN_ACK).build())?;
        assert_eq!(run.packet().tuple(), (node_port, client));
        let run = rig.run(HookId::FromWire, &Frame::tcp(client, node_port, ACK).build())?;
        assert_eq!(run.packet().tuple(), (between, backend));
    }
    let flows = rig.flows()?;
    assert_eq!(flows.iter().filter(|flow| flow.state == State::Established as u32).count(), 10);
    assert!(flows.iter().all(|flow| flow.flags & FlowFlags::OUTSIDE != 0));
    Ok(())
}

/// Flows from outside do not replace those of pods that wait for an answer.
#[test]
fn flood_leaves_questions_of_pods_alone() -> Result<()> {
    let (mut rig, world) = node_with_port(Family::V4)?;
    for port in 0..FLOWS as u16 {
        rig.run(HookId::FromPod, &Frame::udp(at(world.pod, 10_000 + port), world.service).build())?;
    }
    let forged = Frame::tcp(at(world.outside, 40_000), at(world.host, NODE_PORT), SYN);
    assert_eq!(rig.run(HookId::FromWire, &forged.build())?.outcome, "flow_table_full");
    for port in 0..FLOWS as u16 {
        answer(&mut rig, &world, at(world.pod, 10_000 + port))?;
    }
    Ok(())
}

/// However many live flows lie in a row, every free slot is found.
#[test]
fn free_slots_are_found_behind_live_flows() -> Result<()> {
    for slots in [FLOWS, 1_000] {
        let node = NodeConfig { flow_slots: slots, ..per_packet_udp() };
        let (mut rig, world) = rig_with(Family::V4, &node)?;
        rig.service(world.service, Protocol::UDP, 110, &[at(world.wire_pod, 53)], 0)?;
        let slots = slots as u16;
        for port in 0..slots {
            exchange(&mut rig, &world, at(world.pod, 10_000 + port))?;
        }
        // all but those made first, and one
        let live = slots / 4;
        age(&mut rig, 200, |port| port - 10_000 >= live && port - 10_000 != slots / 2)?;
        for port in 0..slots - live - 1 {
            exchange(&mut rig, &world, at(world.pod, 30_000 + port))?;
        }
        for port in (0..live).chain([slots / 2]) {
            answer(&mut rig, &world, at(world.pod, 10_000 + port))?;
        }
        assert_eq!(rig.flows()?.len(), usize::from(slots));
    }
    Ok(())
}

/// RFC 4787, REQ-5.
#[test]
fn idle_mapping_gives_way_to_nothing_while_a_slot_is_free() -> Result<()> {
    let (mut rig, world) = node_with_port(Family::V4)?;
    for port in 0..FLOWS as u16 {
        exchange(&mut rig, &world, at(world.pod, 10_000 + port))?;
    }
    age(&mut rig, 200, |port| port != 10_007)?;
    age(&mut rig, 119, |port| port == 10_007)?;
    for port in 1..FLOWS as u16 {
        exchange(&mut rig, &world, at(world.pod, 20_000 + port))?;
    }
    answer(&mut rig, &world, at(world.pod, 10_007))?;
    let late = Frame::udp(at(world.pod, 30_000), world.service).build();
    assert_eq!(rig.run(HookId::FromPod, &late)?.outcome, "flow_table_full");
    // two minutes of silence: now it does
    age(&mut rig, 120, |port| port == 10_007)?;
    assert_eq!(rig.run(HookId::FromPod, &late)?.outcome, "to_wire");
    Ok(())
}

/// The last free port of a range is found, for one destination; another has all of them.
#[test]
fn every_port_of_the_range_is_found() -> Result<()> {
    const PORTS: u16 = 1_000;
    let node = NodeConfig {
        flow_slots: 1_024,
        snat_first: Port::new(61_000),
        snat_last: Port::new(61_000 + (PORTS - 1)),
        ..per_packet_udp()
    };
    let (mut rig, world) = rig_with(Family::V4, &node)?;
    let mut used = BTreeSet::new();
    let mut refused = 0;
    for number in 0..PORTS {
        let frame = Frame::udp(at(world.pod, 10_000 + number), at(world.outside, 443));
        let run = rig.run(HookId::ToWire, &frame.build())?;
        if run.outcome == "masqueraded" {
            assert!(used.insert(run.packet().tuple().0.port()), "one flow per port");
        } else {
            assert_eq!(run.outcome, "ports_exhausted");
            assert!(used.len() * 100 >= usize::from(PORTS) * 99, "refused at {} ports", used.len());
            refused += 1;
        }
        // none of them may be replaced
        if number % 16 == 0 {
            rig.age_flows(|flow| flow.state = State::Established as u32)?;
        }
    }
    assert!(refused <= PORTS / 100, "{refused}");
    let frame = Frame::udp(at(world.pod, 10_000), at(world.outside, 444));
    assert_eq!(rig.run(HookId::ToWire, &frame.build())?.outcome, "masqueraded");
    Ok(())
}
