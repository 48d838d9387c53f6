//! The flow table: pairs live and die together, who goes when it is full, what a removed backend means.

use anyhow::Result;
use dataplane_common::{
    abi::{NodeConfig, Port, RouteKind},
    flow::State,
    net::Protocol,
    reason::HookId,
};
use dataplane_testkit::prog::{FLOWS, Family, Frame, Rig, Run, at, node_config, rig, rig_with};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const FIN_ACK: u8 = 0x11;
const RST: u8 = 0x04;

#[test]
fn a_removed_udp_backend_is_left_at_the_next_packet() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let run = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        assert_eq!(run.packet().dst, world.wire_pod);
        // as the agent does it: the new list, then the generation of what is gone
        rig.service(world.service, Protocol::UDP, 50, &[at(world.overlay_pod, 8080)], 0)?;
        rig.raise_generation(world.backend())?;
        let run = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        assert_eq!((run.outcome, run.packet().dst), ("to_overlay", world.overlay_pod));
        // what the old backend still says is understood
        let run = rig.run(HookId::FromWire, &Frame::udp(at(world.wire_pod, 8080), client).build())?;
        assert_eq!(run.packet().tuple(), (world.service, client));
    }
    Ok(())
}

#[test]
fn an_established_tcp_connection_stays_with_its_backend() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        rig.service(world.service, Protocol::TCP, 50, &[at(world.overlay_pod, 8080)], 0)?;
        rig.raise_generation(world.backend())?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
        assert_eq!(run.packet().dst, world.wire_pod, "a removed pod drains its connections");
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!(run.packet().dst, world.overlay_pod, "a new connection does not go there");
    }
    Ok(())
}

#[test]
fn the_ports_of_an_ended_connection_may_be_used_again() -> Result<()> {
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
        "the old reply tuple is taken over, no other port is needed"
    );
    let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
    assert_eq!(run.packet().tuple(), (world.service, client));
    Ok(())
}

/// Whoever ended it: the client that begins anew has given the old connection up, and may get another backend.
#[test]
fn a_new_connection_with_the_ports_of_an_ended_one_chooses_anew() -> Result<()> {
    for (hook, flags) in [(HookId::FromPod, FIN_ACK), (HookId::FromWire, FIN_ACK), (HookId::FromWire, RST)] {
        let (mut rig, world) = rig(Family::V4)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
        // its backend still serves: nothing but the end of the connection lets it move
        rig.service(world.service, Protocol::TCP, 50, &[at(world.overlay_pod, 8080)], 0)?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!(run.packet().dst, world.wire_pod, "not ended");
        let last = if hook == HookId::FromPod { (client, world.service) } else { (backend, client) };
        rig.run(hook, &Frame::tcp(last.0, last.1, flags).build())?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!(run.packet().dst, world.overlay_pod, "ended at {}", hook.name());
    }
    Ok(())
}

/// A client that has said all waits for its answer: nobody else gets the tuple under which that arrives.
#[test]
fn an_answer_to_who_has_ended_finds_him() -> Result<()> {
    for family in Family::BOTH {
        let few = NodeConfig { snat_first: Port::new(61_000), snat_last: Port::new(61_000), ..node_config() };
        let (mut rig, world) = rig_with(family, &few)?;
        let (client, server) = (at(world.pod, 40_000), at(world.outside, 443));
        let out = |rig: &mut Rig, client, flags| {
            rig.run(HookId::ToWire, &Frame::tcp(client, server, flags).build())
        };
        let between = out(&mut rig, client, SYN)?.packet().tuple().0;
        rig.run(HookId::FromWire, &Frame::tcp(server, between, SYN_ACK).build())?;
        out(&mut rig, client, ACK)?;
        out(&mut rig, client, FIN_ACK)?;
        rig.age_flows(|flow| flow.last_seen = flow.last_seen.saturating_sub(600))?;
        assert_eq!(out(&mut rig, at(world.other_pod, 40_000), SYN)?.outcome, "ports_exhausted");
        let run = rig.run(HookId::FromWire, &Frame::tcp(server, between, ACK).build())?;
        assert_eq!(run.packet().tuple(), (server, client));
    }
    Ok(())
}

/// The record of a flow is written after its tuples are claimed: who looks meanwhile finds an odd epoch.
#[test]
fn a_reply_that_is_just_being_claimed_is_not_taken_over() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
    rig.claim_as_if_at_work(backend, client, Protocol::TCP)?;
    let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
    let (src, dst) = run.packet().tuple();
    assert_eq!((src.ip(), dst), (client.ip(), backend));
    assert_ne!(src.port(), client.port(), "told apart by a source port");
    Ok(())
}

/// A node that comes back gets a new row, with its gates closed: they open with the next packet of what goes on.
#[test]
fn connections_outlive_the_row_of_their_client() -> Result<()> {
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
fn the_port_of_an_ended_connection_may_ask_the_backend_itself() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, FIN_ACK).build())?;
        let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, FIN_ACK).build())?;
        assert_eq!(run.packet().tuple(), (world.service, client), "it is not over yet");
        // its socket was translated when it connected, or there is no service
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, backend, SYN).build())?;
        assert_eq!(run.packet().tuple(), (client, backend));
        for flags in [SYN_ACK, ACK] {
            let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, flags).build())?;
            assert_eq!(run.packet().tuple(), (backend, client), "it asked no service");
        }
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!(run.packet().tuple(), (client, backend));
        let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        assert_eq!(run.packet().tuple(), (world.service, client), "and now it asks it again");
    }
    Ok(())
}

#[test]
fn two_services_with_one_backend_do_not_share_a_reply() -> Result<()> {
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
        assert_ne!(second.0.port(), client.port(), "told apart by a source port");
        for (tuple, service) in [(first, world.service), (second, twin)] {
            let run = rig.run(HookId::FromWire, &Frame::tcp(tuple.1, tuple.0, SYN_ACK).build())?;
            assert_eq!(run.packet().tuple(), (service, client));
        }
    }
    Ok(())
}

#[test]
fn a_full_table_keeps_established_connections_and_names_the_refusal() -> Result<()> {
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
    assert_eq!(rig.flows()?.len(), FLOWS as usize, "nobody was thrown out");

    // one of them has been closing for a while: it gives way, both halves of it
    let closing = at(world.pod, 10_007);
    rig.age_flows(|flow| {
        if flow.forward.src_port.get() == closing.port() {
            flow.state = State::Closing as u32;
            flow.last_seen = flow.last_seen.saturating_sub(10);
        }
    })?;
    // the table is searched a few slots at a time
    let mut tries = 0;
    while rig.run(HookId::FromPod, &late)?.outcome == "flow_table_full" {
        tries += 1;
        assert!(tries < FLOWS, "every slot has been looked at");
    }
    assert_eq!(rig.flows()?.len(), FLOWS as usize);
    let run = rig.run(HookId::FromWire, &Frame::tcp(backend, closing, ACK).build())?;
    assert_eq!(run.packet().src, world.wire_pod, "no flow restores it: the pair is gone whole");
    Ok(())
}

/// Ports of the node are few: those of connections that are past serve again, long before their flows make room.
#[test]
fn ports_of_connections_that_are_past_serve_others() -> Result<()> {
    for family in Family::BOTH {
        let few = NodeConfig { snat_first: Port::new(61_000), snat_last: Port::new(61_001), ..node_config() };
        let (mut rig, world) = rig_with(family, &few)?;
        let server = at(world.outside, 443);
        let client = |port| at(world.pod, port);
        let asks = |rig: &mut Rig, port, flags| -> Result<Run> {
            rig.run(HookId::ToWire, &Frame::tcp(client(port), server, flags).build())
        };
        let mut used = Vec::new();
        // a port is tried at random: until both are taken
        for port in 10_000..10_100 {
            let run = asks(&mut rig, port, SYN)?;
            if run.outcome == "masqueraded" {
                let between = run.packet().tuple().0;
                rig.run(HookId::FromWire, &Frame::tcp(server, between, SYN_ACK).build())?;
                used.push((port, between));
            }
        }
        assert_eq!(used.len(), 2, "as many as there are ports: {used:?}");
        assert_eq!(asks(&mut rig, 20_000, SYN)?.outcome, "ports_exhausted");

        let (gone, between) = used[0];
        rig.age_flows(|flow| {
            if flow.forward.src_port.get() == gone {
                flow.state = State::Closing as u32;
                flow.last_seen = flow.last_seen.saturating_sub(6);
            }
        })?;
        let heir = (20_000..20_100).find_map(|port| {
            let run = asks(&mut rig, port, SYN).ok()?;
            (run.outcome == "masqueraded").then(|| (port, run.packet().tuple().0))
        });
        let (heir, port_of_heir) = heir.expect("so many tries find one of two ports");
        assert_eq!(port_of_heir, between);
        let run = rig.run(HookId::FromWire, &Frame::tcp(server, between, SYN_ACK).build())?;
        assert_eq!(run.packet().dst_port, heir, "the reply is the new connection's");
        assert_eq!(rig.flows()?.len(), 2, "the old one went whole");
        assert_eq!(asks(&mut rig, gone, ACK)?.outcome, "ports_exhausted", "it would be a new connection");
        assert_eq!(asks(&mut rig, used[1].0, ACK)?.packet().tuple().0, used[1].1, "the other is untouched");
    }
    Ok(())
}

#[test]
fn half_open_flows_give_way_to_new_ones() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    for port in 0..FLOWS as u16 {
        let client = at(world.pod, 10_000 + port);
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        // that the backend answers says nothing of the client, whose address may not be his
        if port % 2 == 0 {
            rig.run(HookId::FromWire, &Frame::tcp(at(world.wire_pod, 8080), client, SYN_ACK).build())?;
        }
    }
    rig.age_flows(|flow| flow.last_seen = flow.last_seen.saturating_sub(3))?;
    for port in 0..FLOWS as u16 {
        let run =
            rig.run(HookId::FromPod, &Frame::tcp(at(world.pod, 20_000 + port), world.service, SYN).build())?;
        assert_eq!(run.outcome, "to_wire", "a flood of openings does not lock out the next");
    }
    let flows = rig.flows()?;
    assert_eq!(flows.len(), FLOWS as usize);
    assert!(flows.iter().all(|flow| flow.forward.src_port.get() >= 20_000));
    Ok(())
}
