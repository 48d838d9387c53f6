//! How long a flow translates: until its timeout, and beyond an RST that its connection survives.

use anyhow::Result;
use dataplane_common::{abi::ServiceFlags, flow::State, net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Family, Frame, Rig, World, at, per_packet_udp, rig_with};

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = 0x12;
const FIN_ACK: u8 = 0x11;

/// A node with a connection of a pod to a service.
fn established(family: Family) -> Result<(Rig, World)> {
    let (mut rig, world) = rig_with(family, &per_packet_udp())?;
    let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
    rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
    rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
    rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
    Ok((rig, world))
}

fn age(rig: &mut Rig, seconds: u32) -> Result<()> {
    rig.age_flows(|flow| flow.last_seen = flow.last_seen.saturating_sub(seconds))
}

/// Sequence numbers are not followed: anybody who knows the ports can send an RST that both ends
/// ignore.
#[test]
fn connection_that_goes_on_after_a_reset_is_established() -> Result<()> {
    for family in Family::BOTH {
        for (hook, is_reply) in [(HookId::FromWire, true), (HookId::FromPod, false)] {
            let (mut rig, world) = established(family)?;
            let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
            let (src, dst) = if is_reply { (backend, client) } else { (client, world.service) };
            let forged = Frame::tcp(src, dst, RST);
            rig.run(hook, &forged.build())?;
            assert_eq!(rig.flows()?[0].state, State::Reset as u32);
            rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
            assert_eq!(rig.flows()?[0].state, State::ResetForward as u32);
            rig.run(HookId::FromWire, &Frame::tcp(backend, client, ACK).build())?;
            assert_eq!(rig.flows()?[0].state, State::Established as u32);
            // as long as before
            age(&mut rig, 7_000)?;
            let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, ACK).build())?;
            assert_eq!(run.packet().tuple(), (world.service, client));
        }
    }
    Ok(())
}

#[test]
fn reset_connection_is_translated_until_its_shorter_timeout() -> Result<()> {
    let (mut rig, world) = established(Family::V4)?;
    let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
    rig.run(HookId::FromWire, &Frame::tcp(backend, client, RST).build())?;
    age(&mut rig, 25)?;
    let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
    assert_eq!(run.packet().tuple(), (client, backend));
    age(&mut rig, 35)?;
    let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, ACK).build())?;
    assert_eq!(run.packet().tuple(), (backend, client), "the flow is absent");
    Ok(())
}

/// A client that asked a service, and whose socket later exchanges datagrams with the pod itself
/// from the same port, receives answers from the address of the pod.
#[test]
fn expired_flow_does_not_translate() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig_with(family, &per_packet_udp())?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let request = Frame::udp(client, world.service).build();
        let answer = Frame::udp(backend, client).build();
        rig.run(HookId::FromPod, &request)?;
        assert_eq!(rig.run(HookId::FromWire, &answer)?.packet().tuple(), (world.service, client));
        age(&mut rig, 170)?;
        assert_eq!(rig.run(HookId::FromWire, &answer)?.packet().tuple(), (world.service, client));
        age(&mut rig, 200)?;
        assert_eq!(rig.run(HookId::FromWire, &answer)?.packet().tuple(), (backend, client));
        // nor is the packet that an ICMP error quotes
        let quoted = Frame::udp(client, backend).build();
        let error = Frame::too_big(world.outside, client.ip(), &quoted).build();
        let run = rig.run(HookId::FromWire, &error)?;
        assert_eq!(run.outcome, "to_pod");
        assert!(run.frame.ends_with(&quoted[14..]), "the quoted packet was translated");
        // the next request makes a flow in its place
        rig.run(HookId::FromPod, &request)?;
        assert_eq!(rig.run(HookId::FromWire, &answer)?.packet().tuple(), (world.service, client));
        assert_eq!(rig.flows()?.len(), 1);
    }
    Ok(())
}

/// RFC 5382 asks for two hours and four minutes, connection tracking of the kernel has five days.
#[test]
fn idle_connection_is_translated_while_its_slot_is_not_needed() -> Result<()> {
    let (mut rig, world) = established(Family::V4)?;
    let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
    age(&mut rig, 1_000_000)?;
    let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, ACK).build())?;
    assert_eq!(run.packet().tuple(), (client, backend));
    Ok(())
}

/// Direct server return: the client's last packet acknowledges the server's FIN, which does not
/// pass this node.
#[test]
fn direct_connection_is_closed_by_the_fin_of_its_client() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig_with(family, &per_packet_udp())?;
        rig.host_with_node_ports(world.host)?;
        let (client, frontend) = (at(world.outside, 40_000), at(world.host, 30_080));
        rig.service_with(frontend, Protocol::TCP, 200, &[at(world.wire_pod, 8080)], |key, service| {
            *key = key.at_node();
            service.flags = ServiceFlags::HASH | ServiceFlags::DSR;
        })?;
        for (flags, state) in [
            (SYN, State::HalfOpen),
            (ACK, State::Established),
            (FIN_ACK, State::Closing),
            (ACK, State::Closing),
            // of another connection with these ports
            (SYN, State::HalfOpen),
            (ACK, State::Established),
            // a forged one
            (RST, State::Reset),
            (ACK, State::Established),
        ] {
            rig.run(HookId::FromWire, &Frame::tcp(client, frontend, flags).build())?;
            assert_eq!(State::from_number(rig.flows()?[0].state), state, "{flags:#x}");
        }
    }
    Ok(())
}
