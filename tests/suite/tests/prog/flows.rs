//! The flow table: both tuples of a flow are added and removed together, which flow is evicted from
//! a full table, what the removal of a backend does.

use anyhow::Result;
use dataplane_common::{
    abi::{NodeConfig, Port, RouteKind},
    flow::State,
    net::Protocol,
    reason::HookId,
};
use dataplane_testkit::prog::{
    FLOWS, Family, Frame, Rig, Run, at, node_config, per_packet_udp, rig, rig_with,
};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const FIN_ACK: u8 = 0x11;
const RST: u8 = 0x04;

#[test]
fn udp_flow_changes_backend_when_its_backend_is_removed() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let run = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        assert_eq!(run.packet().dst, world.wire_pod);
        // the agent's order: first the new list, then the generation of the removed backend
        rig.service(world.service, Protocol::UDP, 50, &[at(world.overlay_pod, 8080)], 0)?;
        rig.raise_generation(world.backend())?;
        let run = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        assert_eq!((run.outcome, run.packet().dst), ("to_overlay", world.overlay_pod));
        // a late reply of the old backend is translated back
        let run = rig.run(HookId::FromWire, &Frame::udp(at(world.wire_pod, 8080), client).build())?;
        assert_eq!(run.packet().tuple(), (world.service, client));
    }
    Ok(())
}

/// With connect-time translation of UDP, the client's socket may exchange datagrams with the
/// backend from its own port, without a flow: their answers must not belong to the flow.
#[test]
fn udp_flow_beside_connect_time_translation_has_a_source_port_of_its_own() -> Result<()> {
    for family in Family::BOTH {
        let one_port =
            NodeConfig { snat_first: Port::new(61_000), snat_last: Port::new(61_000), ..node_config() };
        let (mut rig, world) = rig_with(family, &one_port)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let run = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        assert_eq!(run.packet().tuple(), (at(world.pod, 61_000), backend));
        let run = rig.run(HookId::FromWire, &Frame::udp(backend, at(world.pod, 61_000)).build())?;
        assert_eq!(run.packet().tuple(), (world.service, client));
        // an answer to the socket itself
        let run = rig.run(HookId::FromWire, &Frame::udp(backend, client).build())?;
        assert_eq!(run.packet().tuple(), (backend, client));
        // without a free port the flow has the client's
        let client = at(world.pod, 40_001);
        let run = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        assert_eq!(run.packet().tuple(), (client, backend));
        let run = rig.run(HookId::FromWire, &Frame::udp(backend, client).build())?;
        assert_eq!(run.packet().tuple(), (world.service, client));
    }
    Ok(())
}

#[test]
fn established_tcp_connection_keeps_its_removed_backend() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        rig.service(world.service, Protocol::TCP, 50, &[at(world.overlay_pod, 8080)], 0)?;
        rig.raise_generation(world.backend())?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
        assert_eq!(run.packet().dst, world.wire_pod, "connections to a removed pod drain");
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!(run.packet().dst, world.overlay_pod, "a new connection gets another backend");
    }
    Ok(())
}

#[test]
fn tuple_of_a_closed_connection_is_reused() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
    rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
    let state = |rig: &mut Rig| -> Result<u32> { Ok(rig.flows()?[0].state) };
    rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
    assert_eq!(state(&mut rig)?, State::Answered as u32);
    rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
    assert_eq!(state(&mut rig)?, State::Established as u32);
    rig.run(HookId::FromPod, &Frame::tcp(client, world.service, FIN_ACK).build())?;
    assert_eq!(state(&mut rig)?, State::EndedForward as u32);
    rig.run(HookId::FromWire, &Frame::tcp(backend, client, FIN_ACK).build())?;
    assert_eq!(state(&mut rig)?, State::Closing as u32);
    let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
    assert_eq!(
        run.packet().tuple(),
        (client, backend),
        "the old reply tuple is reused, with the same source port"
    );
    let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
    assert_eq!(run.packet().tuple(), (world.service, client));
    Ok(())
}

/// Whichever side closed it: a client that connects again has given up the old connection, and may
/// get another backend.
#[test]
fn new_connection_with_the_ports_of_a_closed_one_selects_a_backend_again() -> Result<()> {
    for (hook, flags) in [(HookId::FromPod, FIN_ACK), (HookId::FromWire, FIN_ACK), (HookId::FromWire, RST)] {
        let (mut rig, world) = rig(Family::V4)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
        // its backend still serves: only the end of the connection permits another selection
        rig.service(world.service, Protocol::TCP, 50, &[at(world.overlay_pod, 8080)], 0)?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!(run.packet().dst, world.wire_pod, "not closed");
        let last = if hook == HookId::FromPod { (client, world.service) } else { (backend, client) };
        rig.run(hook, &Frame::tcp(last.0, last.1, flags).build())?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!(run.packet().dst, world.overlay_pod, "closed at {}", hook.name());
    }
    Ok(())
}

/// A client that has closed its side still waits for the reply: its tuple is not reused before two
/// minutes of silence, and only if there is no other.
#[test]
fn reply_reaches_a_client_that_has_closed_its_side() -> Result<()> {
    for family in Family::BOTH {
        let few =
            NodeConfig { snat_first: Port::new(61_000), snat_last: Port::new(61_000), ..per_packet_udp() };
        let (mut rig, world) = rig_with(family, &few)?;
        let (client, server) = (at(world.pod, 40_000), at(world.outside, 443));
        let out = |rig: &mut Rig, client, flags| {
            rig.run(HookId::ToWire, &Frame::tcp(client, server, flags).build())
        };
        let between = out(&mut rig, client, SYN)?.packet().tuple().0;
        rig.run(HookId::FromWire, &Frame::tcp(server, between, SYN_ACK).build())?;
        out(&mut rig, client, ACK)?;
        out(&mut rig, client, FIN_ACK)?;
        let age =
            |rig: &mut Rig, by| rig.age_flows(|flow| flow.last_seen = flow.last_seen.saturating_sub(by));
        age(&mut rig, 110)?;
        assert_eq!(out(&mut rig, at(world.other_pod, 40_000), SYN)?.outcome, "ports_exhausted");
        let run = rig.run(HookId::FromWire, &Frame::tcp(server, between, ACK).build())?;
        assert_eq!(run.packet().tuple(), (server, client));
        age(&mut rig, 120)?;
        let run = out(&mut rig, at(world.other_pod, 40_000), SYN)?;
        assert_eq!((run.outcome, run.packet().tuple().0), ("masqueraded", between));
    }
    Ok(())
}

/// The flow is written after its tuples are inserted; until then its slot has another epoch.
#[test]
fn reply_tuple_of_an_unwritten_flow_is_not_reused() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
    rig.insert_unwritten_flow(backend, client, Protocol::TCP)?;
    let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
    let (src, dst) = run.packet().tuple();
    assert_eq!((src.ip(), dst), (client.ip(), backend));
    assert_ne!(src.port(), client.port(), "another source port");
    Ok(())
}

/// A node that returns gets a new route row without flow hints. The next packet of an existing flow
/// sets them again.
#[test]
fn connections_survive_a_new_route_row_of_their_client() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        rig.host_with_node_ports(world.host)?;
        let (client, frontend, backend) =
            (at(world.outside, 40_000), at(world.host, 30_080), at(world.pod, 8080));
        rig.service_with(frontend, Protocol::TCP, 50, &[backend], |key, _| *key = key.at_node())?;
        rig.run(HookId::FromWire, &Frame::tcp(client, frontend, SYN).build())?;
        rig.run(HookId::FromPod, &Frame::tcp(backend, client, SYN_ACK).build())?;
        rig.route((world.outside, client_bits(family)), RouteKind::Native, Some(world.wire_node), 1_500)?;
        rig.age_flows(|flow| flow.last_seen = flow.last_seen.saturating_sub(1))?;
        rig.run(HookId::FromWire, &Frame::tcp(client, frontend, ACK).build())?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(backend, client, ACK).build())?;
        assert_eq!(run.packet().tuple(), (frontend, client));
    }
    Ok(())
}

const fn client_bits(family: Family) -> u32 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

#[test]
fn client_may_connect_to_the_backend_directly_from_the_port_of_a_closed_connection() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, FIN_ACK).build())?;
        let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, FIN_ACK).build())?;
        assert_eq!(run.packet().tuple(), (world.service, client), "the flow still exists");
        // with connect-time translation, or without a service
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, backend, SYN).build())?;
        assert_eq!(run.packet().tuple(), (client, backend));
        for flags in [SYN_ACK, ACK] {
            let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, flags).build())?;
            assert_eq!(run.packet().tuple(), (backend, client), "a direct connection is not translated");
        }
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!(run.packet().tuple(), (client, backend));
        let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        assert_eq!(
            run.packet().tuple(),
            (world.service, client),
            "a new connection through the service is translated"
        );
    }
    Ok(())
}

#[test]
fn two_services_with_one_backend_have_separate_replies() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let twin = at(world.service.ip(), 8_888);
        rig.service(twin, Protocol::TCP, world.backend(), &[backend], 0)?;
        let first =
            rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?.packet().tuple();
        let second = rig.run(HookId::FromPod, &Frame::tcp(client, twin, SYN).build())?.packet().tuple();
        assert_eq!(first, (client, backend));
        assert_eq!(second.0.ip(), client.ip());
        assert_ne!(second.0.port(), client.port(), "another source port");
        for (tuple, service) in [(first, world.service), (second, twin)] {
            let run = rig.run(HookId::FromWire, &Frame::tcp(tuple.1, tuple.0, SYN_ACK).build())?;
            assert_eq!(run.packet().tuple(), (service, client));
        }
    }
    Ok(())
}

#[test]
fn full_table_keeps_established_connections_and_counts_the_drop() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let backend = at(world.wire_pod, 8080);
    for port in 0..FLOWS as u16 {
        let client = at(world.pod, 10_000 + port);
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
    }
    rig.age_flows(|flow| flow.last_seen = flow.last_seen.saturating_sub(600))?;
    assert_eq!(rig.flows()?.len(), FLOWS as usize);
    let late = Frame::tcp(at(world.pod, 30_000), world.service, SYN).build();
    let run = rig.run(HookId::FromPod, &late)?;
    assert_eq!(run.outcome, "flow_table_full");
    assert_eq!(rig.flows()?.len(), FLOWS as usize, "no flow was evicted");

    // a flow that has been closing for a while is evicted, with both tuples
    let closing = at(world.pod, 10_007);
    rig.age_flows(|flow| {
        if flow.forward.src_port.get() == closing.port() {
            flow.state = State::Closing as u32;
            flow.last_seen = flow.last_seen.saturating_sub(10);
        }
    })?;
    assert_eq!(rig.run(HookId::FromPod, &late)?.outcome, "to_wire");
    assert_eq!(rig.flows()?.len(), FLOWS as usize);
    let run = rig.run(HookId::FromWire, &Frame::tcp(backend, closing, ACK).build())?;
    assert_eq!(run.packet().src, world.wire_pod, "not translated: both tuples were evicted");
    Ok(())
}

/// SNAT ports of closed connections are reused long before their flows are evicted.
#[test]
fn snat_ports_of_closed_connections_are_reused() -> Result<()> {
    for family in Family::BOTH {
        let few =
            NodeConfig { snat_first: Port::new(61_000), snat_last: Port::new(61_001), ..per_packet_udp() };
        let (mut rig, world) = rig_with(family, &few)?;
        let server = at(world.outside, 443);
        let client = |port| at(world.pod, port);
        let send = |rig: &mut Rig, port, flags| -> Result<Run> {
            rig.run(HookId::ToWire, &Frame::tcp(client(port), server, flags).build())
        };
        let mut used = Vec::new();
        for port in [10_000, 10_001] {
            let between = send(&mut rig, port, SYN)?.packet().tuple().0;
            rig.run(HookId::FromWire, &Frame::tcp(server, between, SYN_ACK).build())?;
            used.push((port, between));
        }
        assert_ne!(used[0].1, used[1].1, "one connection per port");
        assert_eq!(send(&mut rig, 20_000, SYN)?.outcome, "ports_exhausted");

        let (closed, between) = used[0];
        rig.age_flows(|flow| {
            if flow.forward.src_port.get() == closed {
                flow.state = State::Closing as u32;
                flow.last_seen = flow.last_seen.saturating_sub(6);
            }
        })?;
        let successor = 20_001;
        assert_eq!(send(&mut rig, successor, SYN)?.packet().tuple().0, between);
        let run = rig.run(HookId::FromWire, &Frame::tcp(server, between, SYN_ACK).build())?;
        assert_eq!(run.packet().dst_port, successor, "the reply belongs to the new connection");
        assert_eq!(rig.flows()?.len(), 2, "the old flow was removed completely");
        assert_eq!(
            send(&mut rig, closed, ACK)?.outcome,
            "delivered",
            "a packet of the old connection makes no new flow"
        );
        assert_eq!(
            send(&mut rig, used[1].0, ACK)?.packet().tuple().0,
            used[1].1,
            "the other connection is unchanged"
        );
    }
    Ok(())
}

#[test]
fn unconfirmed_flows_are_given_up_for_new_ones() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    for port in 0..FLOWS as u16 {
        let client = at(world.pod, 10_000 + port);
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        // a SYN-ACK does not prove the client's address: the flow stays half-open
        if port % 2 == 0 {
            rig.run(HookId::FromWire, &Frame::tcp(at(world.wire_pod, 8080), client, SYN_ACK).build())?;
        }
    }
    for port in 0..FLOWS as u16 {
        let run =
            rig.run(HookId::FromPod, &Frame::tcp(at(world.pod, 20_000 + port), world.service, SYN).build())?;
        assert_eq!(run.outcome, "to_wire", "a SYN flood does not block new connections");
    }
    let flows = rig.flows()?;
    assert_eq!(flows.len(), FLOWS as usize);
    assert!(flows.iter().all(|flow| flow.forward.src_port.get() >= 20_000));
    Ok(())
}
