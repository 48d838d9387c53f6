//! Packets above the path MTU after translation: the datapath sends the ICMP error where the stack
//! would not (RFC 1191, RFC 8201).

use std::net::SocketAddr;

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Parsed, Rig, Run, World, at, rig};

const NODE_PORT: u16 = 30_080;
const SLOT: u32 = 200;
/// MTU of the tunnel (`World`).
const TUNNEL: u16 = 1_450;

/// A node port with a backend behind the tunnel.
fn node_port_behind_tunnel(family: Family) -> Result<(Rig, World, SocketAddr)> {
    let (mut rig, world) = rig(family)?;
    rig.host_with_node_ports(world.host)?;
    let frontend = at(world.host, NODE_PORT);
    for protocol in [Protocol::TCP, Protocol::UDP] {
        let backends = [at(world.overlay_pod, 8080)];
        rig.service_with(frontend, protocol, SLOT, &backends, |key, _| *key = key.at_node())?;
    }
    Ok((rig, world, frontend))
}

/// A datagram with DF in an IP packet of this size.
fn datagram(client: SocketAddr, server: SocketAddr, size: usize) -> Frame {
    let headers = if client.is_ipv4() { 20 + 8 } else { 40 + 8 };
    Frame { dont_fragment: true, payload: vec![0x55; size - headers], ..Frame::udp(client, server) }
}

/// The parsed ICMP error, its MTU and the packet it quotes.
fn too_big_message(run: &Run, family: Family) -> (Parsed, u16, Vec<u8>) {
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
fn client_of_a_node_port_gets_the_mtu_of_the_tunnel() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node_port_behind_tunnel(family)?;
        let client = at(world.outside, 40_000);
        let run = rig.run(HookId::FromWire, &datagram(client, frontend, TUNNEL.into()).build())?;
        assert_eq!(run.outcome, "to_overlay", "exactly the MTU");
        for protocol in [Protocol::UDP, Protocol::TCP] {
            let frame = Frame { protocol, ..datagram(client, frontend, usize::from(TUNNEL) + 1) }.build();
            let run = rig.run(HookId::FromWire, &frame)?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "too_big"), "{protocol}");
            let (message, mtu, carried) = too_big_message(&run, family);
            assert_eq!((message.src, message.dst, mtu), (world.host, world.outside, TUNNEL));
            assert_eq!(carried, frame[14..14 + carried.len()], "the packet as the client sent it");
            assert!(carried.len() >= if family == Family::V4 { 28 } else { 48 }, "with its ports");
        }
    }
    Ok(())
}

/// IPv4 without DF: the outer packet is fragmented.
#[test]
fn packet_without_df_goes_into_the_tunnel() -> Result<()> {
    let (mut rig, world, frontend) = node_port_behind_tunnel(Family::V4)?;
    let frame = Frame { dont_fragment: false, ..datagram(at(world.outside, 40_000), frontend, 1_500) };
    let run = rig.run(HookId::FromWire, &frame.build())?;
    assert_eq!(run.outcome, "to_overlay");
    assert_eq!(run.packet().tuple().1, at(world.overlay_pod, 8080));
    Ok(())
}

/// The first IPv6 fragment has the ports, and gets the ICMP error; the sender then sends smaller
/// fragments.
#[test]
fn first_ipv6_fragment_above_the_mtu_gets_the_icmp_error() -> Result<()> {
    let (mut rig, world, frontend) = node_port_behind_tunnel(Family::V6)?;
    let client = at(world.outside, 40_000);
    let first =
        Frame { fragment: Some((0, true)), payload: vec![1; 1_440], ..Frame::udp(client, frontend) }.build();
    let run = rig.run(HookId::FromWire, &first)?;
    assert_eq!((run.action, run.outcome), (Action::Redirect, "too_big"));
    let (message, mtu, carried) = too_big_message(&run, Family::V6);
    assert_eq!((message.dst, mtu), (world.outside, TUNNEL));
    assert_eq!(carried, first[14..14 + 40 + 16], "fragment header and ports");
    let later =
        Frame { fragment: Some((181, false)), payload: vec![1; 1_440], ..Frame::udp(client, frontend) };
    let run = rig.run(HookId::FromWire, &later.build())?;
    assert_eq!((run.action, run.outcome), (Action::Drop, "too_big"), "one ICMP error per packet");
    Ok(())
}

/// Without SNAT the stack receives the packet and sends the ICMP error.
#[test]
fn pod_gets_the_icmp_error_from_the_stack() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frontend = at(world.service.ip(), 99);
        rig.service(frontend, Protocol::UDP, SLOT, &[at(world.overlay_pod, 8080)], 0)?;
        let run = rig.run(HookId::FromPod, &datagram(at(world.pod, 40_000), frontend, 1_500).build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_too_big"));
    }
    Ok(())
}
