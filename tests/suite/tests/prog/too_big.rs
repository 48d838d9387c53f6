//! Packets that are too big for their way once they are translated: the sender hears it from us, where the stack would not
//! say it (RFC 1191, RFC 8201).

use std::net::SocketAddr;

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Parsed, Rig, Run, World, at, rig};

const NODE_PORT: u16 = 30_080;
const SLOT: u32 = 200;
/// What the tunnel takes (`World`).
const TUNNEL: u16 = 1_450;

/// A node port with a backend behind the tunnel.
fn asked(family: Family) -> Result<(Rig, World, SocketAddr)> {
    let (mut rig, world) = rig(family)?;
    rig.host_with_node_ports(world.host)?;
    let frontend = at(world.host, NODE_PORT);
    for protocol in [Protocol::TCP, Protocol::UDP] {
        let backends = [at(world.overlay_pod, 8080)];
        rig.service_with(frontend, protocol, SLOT, &backends, |key, _| *key = key.at_node())?;
    }
    Ok((rig, world, frontend))
}

/// A datagram that makes an IP packet of so many bytes.
fn datagram(client: SocketAddr, server: SocketAddr, size: usize) -> Frame {
    let headers = if client.is_ipv4() { 20 + 8 } else { 40 + 8 };
    Frame { whole: true, payload: vec![0x55; size - headers], ..Frame::udp(client, server) }
}

/// MTU and beginning of the packet that a "too big" carries, whose checksums are right.
fn said(run: &Run, family: Family) -> (Parsed, u16, Vec<u8>) {
    let message = run.packet();
    let l4 = if family == Family::V4 { 14 + 20 } else { 14 + 40 };
    let kind = if family == Family::V4 { [3, 4] } else { [2, 0] };
    assert_eq!(run.frame[l4..l4 + 2], kind);
    assert_eq!(run.frame[l4 + 4..l4 + 6], [0, 0]);
    let mtu = u16::from_be_bytes([run.frame[l4 + 6], run.frame[l4 + 7]]);
    let carried = message.payload.clone();
    (message, mtu, carried)
}

#[test]
fn the_client_of_a_node_port_hears_what_the_tunnel_takes() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = asked(family)?;
        let client = at(world.outside, 40_000);
        let run = rig.run(HookId::FromWire, &datagram(client, frontend, TUNNEL.into()).build())?;
        assert_eq!(run.outcome, "to_overlay", "just fits");
        for protocol in [Protocol::UDP, Protocol::TCP] {
            let frame = Frame { protocol, ..datagram(client, frontend, usize::from(TUNNEL) + 1) }.build();
            let run = rig.run(HookId::FromWire, &frame)?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "too_big"), "{protocol}");
            let (message, mtu, carried) = said(&run, family);
            assert_eq!((message.src, message.dst, mtu), (world.host, world.outside, TUNNEL));
            assert_eq!(carried, frame[14..14 + carried.len()], "the packet as its sender knows it");
            assert!(carried.len() >= if family == Family::V4 { 28 } else { 48 }, "with its ports");
        }
    }
    Ok(())
}

/// IPv4 without DF: the tunnel's own packet goes in fragments.
#[test]
fn what_may_be_fragmented_goes_into_the_tunnel() -> Result<()> {
    let (mut rig, world, frontend) = asked(Family::V4)?;
    let frame = Frame { whole: false, ..datagram(at(world.outside, 40_000), frontend, 1_500) };
    let run = rig.run(HookId::FromWire, &frame.build())?;
    assert_eq!(run.outcome, "to_overlay");
    assert_eq!(run.packet().tuple().1, at(world.overlay_pod, 8080));
    Ok(())
}

/// The first fragment of IPv6 names the ports, and is answered; the datagram is sent again in smaller ones.
#[test]
fn fragments_of_ipv6_that_are_too_big_are_answered() -> Result<()> {
    let (mut rig, world, frontend) = asked(Family::V6)?;
    let client = at(world.outside, 40_000);
    let first =
        Frame { fragment: Some((0, true)), payload: vec![1; 1_440], ..Frame::udp(client, frontend) }.build();
    let run = rig.run(HookId::FromWire, &first)?;
    assert_eq!((run.action, run.outcome), (Action::Redirect, "too_big"));
    let (message, mtu, carried) = said(&run, Family::V6);
    assert_eq!((message.dst, mtu), (world.outside, TUNNEL));
    assert_eq!(carried, first[14..14 + 40 + 16], "fragment header and ports");
    let later =
        Frame { fragment: Some((181, false)), payload: vec![1; 1_440], ..Frame::udp(client, frontend) };
    let run = rig.run(HookId::FromWire, &later.build())?;
    assert_eq!((run.action, run.outcome), (Action::Drop, "too_big"), "one message for all");
    Ok(())
}

/// A pod keeps its address: the stack takes the packet, and says it.
#[test]
fn a_pod_hears_from_the_stack() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frontend = at(world.service.ip(), 99);
        rig.service(frontend, Protocol::UDP, SLOT, &[at(world.overlay_pod, 8080)], 0)?;
        let run = rig.run(HookId::FromPod, &datagram(at(world.pod, 40_000), frontend, 1_500).build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_too_big"));
    }
    Ok(())
}
