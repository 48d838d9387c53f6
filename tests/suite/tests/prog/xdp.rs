//! The XDP program: which packets it transmits on the same device, and which it passes to tc. With
//! real routes and neighbours, in a separate namespace.

use std::net::SocketAddr;

use anyhow::Result;
use dataplane_common::{abi::ServiceFlags, net::Protocol, reason::HookId};
use dataplane_testkit::prog::{
    Action, Family, Frame, GATEWAY_MAC, HOST_MAC, NODE_MAC, Rig, Run, World, at, ip, rig, uplink,
};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const NODE_PORT: u16 = 30_080;
const SLOT: u32 = 200;

/// A node in a namespace of the calling thread: an uplink with the frame's MAC address, with the
/// other node and a gateway as neighbours. Node port 30080 has a backend on the other node.
fn node(family: Family, flags: u32) -> Result<(Rig, World, SocketAddr)> {
    let (mut rig, world) = rig(family)?;
    uplink(&[family])?;
    rig.device_without_address()?;
    rig.host_with_node_ports(world.host)?;
    let frontend = at(world.host, NODE_PORT);
    for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
        rig.service_with(frontend, protocol, SLOT, &[at(world.wire_pod, 8080)], |key, service| {
            *key = key.at_node();
            service.flags = flags;
        })?;
    }
    Ok((rig, world, frontend))
}

/// Runs the XDP program. Once a second for each neighbour it leaves a packet to tc: that packet is
/// run again, more than once on a machine that is slow at that moment.
fn transmit(rig: &mut Rig, frame: &[u8]) -> Result<Run> {
    for _ in 0..20 {
        let run = rig.run(HookId::XdpWire, frame)?;
        if run.outcome != "left_to_tc" {
            return Ok(run);
        }
    }
    rig.run(HookId::XdpWire, frame)
}

/// The kernel refreshes a neighbour entry only when its own stack uses it.
#[test]
fn packet_is_left_to_tc_once_a_second_for_each_neighbour() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, 0)?;
        let request = Frame::tcp(at(world.outside, 40_000), frontend, SYN).build();
        let run = rig.run(HookId::XdpWire, &request)?;
        assert_eq!((run.action, run.outcome, &run.frame), (Action::Next, "left_to_tc", &request));
        let mut left = 0;
        for _ in 0..50 {
            left += usize::from(rig.run(HookId::XdpWire, &request)?.outcome == "left_to_tc");
        }
        assert!(left <= 3, "{left} of 50 packets in less than three seconds");
    }
    Ok(())
}

#[test]
fn connection_to_a_backend_on_another_node_is_transmitted_both_ways() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, 0)?;
        let client = at(world.outside, 40_000);
        let run = transmit(&mut rig, &Frame::tcp(client, frontend, SYN).build())?;
        assert_eq!((run.action, run.outcome), (Action::Transmit, "to_wire"));
        let request = run.packet();
        assert_eq!((request.eth_dst, request.eth_src, request.hop_limit), (NODE_MAC, HOST_MAC, 63));
        let (between, dst) = request.tuple();
        assert_eq!((between.ip(), dst), (world.host, at(world.wire_pod, 8080)), "with the node as source");

        let run = transmit(&mut rig, &Frame::tcp(dst, between, SYN_ACK).build())?;
        assert_eq!((run.action, run.outcome), (Action::Transmit, "to_outside"));
        let reply = run.packet();
        assert_eq!((reply.eth_dst, reply.eth_src, reply.hop_limit), (GATEWAY_MAC, HOST_MAC, 63));
        assert_eq!(reply.tuple(), (frontend, client));
        assert_eq!(rig.flows()?.len(), 1);
    }
    Ok(())
}

#[test]
fn datagrams_with_and_without_a_checksum_are_transmitted() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, 0)?;
        for no_checksum in [false, true] {
            // in IPv6 the checksum is mandatory (RFC 8200 §8.1)
            if no_checksum && family == Family::V6 {
                continue;
            }
            let client = at(world.outside, 40_000 + u16::from(no_checksum));
            let frame = Frame { no_checksum, ..Frame::udp(client, frontend) }.build();
            let run = transmit(&mut rig, &frame)?;
            assert_eq!(run.action, Action::Transmit);
            assert_eq!(run.packet().tuple().1, at(world.wire_pod, 8080));
            if no_checksum {
                assert_eq!(run.frame[40..42], [0, 0], "a missing checksum stays zero");
            }
        }
    }
    Ok(())
}

#[test]
fn association_with_a_checksum_is_transmitted() -> Result<()> {
    const INIT: u8 = 1;
    const INIT_ACK: u8 = 2;
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, 0)?;
        let client = at(world.outside, 40_000);
        let backend = at(world.wire_pod, 8080);
        let run = transmit(&mut rig, &Frame::sctp(client, frontend, INIT).build())?;
        assert_eq!((run.action, run.outcome), (Action::Transmit, "to_wire"));
        let (between, dst) = run.packet().tuple();
        assert_eq!((between.ip(), dst), (world.host, backend));
        for payload in [0, 1, 2, 3, 1_400] {
            let reply = Frame { payload: vec![7; payload], ..Frame::sctp(backend, between, INIT_ACK) };
            let run = transmit(&mut rig, &reply.build())?;
            assert_eq!((run.action, run.outcome), (Action::Transmit, "to_outside"));
            assert_eq!(run.packet().tuple(), (frontend, client));
        }
        // checksum left to the device, by a virtual machine on the same host: only tc has that
        // information
        let no_checksum = Frame { no_checksum: true, ..Frame::sctp(client, frontend, INIT) }.build();
        let run = rig.run(HookId::XdpWire, &no_checksum)?;
        assert_eq!((run.action, run.outcome, run.frame), (Action::Next, "left_to_tc", no_checksum));
        assert_eq!(rig.flows()?.len(), 1);
    }
    Ok(())
}

/// Any packet of a connection may be handled by either program.
#[test]
fn xdp_and_tc_share_flows() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, 0)?;
        let client = at(world.outside, 40_000);
        let first = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, SYN).build())?.packet().tuple();
        let second = transmit(&mut rig, &Frame::tcp(client, frontend, 0x10).build())?.packet().tuple();
        assert_eq!(first, second);
        let (between, backend) = first;
        let reply = rig.run(HookId::FromWire, &Frame::tcp(backend, between, 0x10).build())?.packet().tuple();
        assert_eq!(reply, (frontend, client));
        assert_eq!(rig.flows()?.len(), 1);
    }
    Ok(())
}

#[test]
fn other_packets_are_passed_to_tc_unchanged() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, 0)?;
        let client = at(world.outside, 40_000);
        let hops = Frame { hop_limit: 1, ..Frame::tcp(client, frontend, SYN) };
        let mut other_mac = Frame::tcp(client, frontend, SYN).build();
        other_mac[5] = 0x66;
        let frames = [
            ("to a pod", Frame::tcp(client, at(world.pod, 80), SYN).build()),
            ("to the host", Frame::tcp(client, at(world.host, 22), SYN).build()),
            ("to an unmanaged address", Frame::tcp(client, at(world.exempt, 80), SYN).build()),
            ("a ping", Frame::ping(client.ip(), world.host, 7).build()),
            ("expired TTL", hops.build()),
            ("to another MAC address", other_mac),
            ("a service without backends", {
                rig.service(at(world.exempt, 443), Protocol::TCP, SLOT + 10, &[], 0)?;
                Frame::tcp(client, at(world.exempt, 443), SYN).build()
            }),
            ("a backend on this node", {
                rig.service(at(world.exempt, 444), Protocol::TCP, SLOT + 11, &[at(world.pod, 1)], 0)?;
                Frame::tcp(client, at(world.exempt, 444), SYN).build()
            }),
            ("a backend behind a tunnel", {
                rig.service(at(world.exempt, 445), Protocol::TCP, SLOT + 12, &[at(world.overlay_pod, 1)], 0)?;
                Frame::tcp(client, at(world.exempt, 445), SYN).build()
            }),
        ];
        for (what, frame) in frames {
            let run = rig.run(HookId::XdpWire, &frame)?;
            assert_eq!((run.action, run.outcome), (Action::Next, "left_to_tc"), "{what}");
            assert_eq!(run.frame, frame, "{what}");
        }
        // the selected backend on this node is kept
        let frame = Frame::tcp(client, at(world.exempt, 444), SYN).build();
        assert_eq!(rig.run(HookId::FromWire, &frame)?.packet().tuple(), (client, at(world.pod, 1)));
    }
    Ok(())
}

/// A device in promiscuous mode, or behind a switch that floods, receives frames for others.
#[test]
fn frame_for_another_station_gets_no_flow() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, 0)?;
        let own = Frame::tcp(at(world.outside, 40_000), frontend, SYN).build();
        let mut other = own.clone();
        other[5] = 0x66;
        for _ in 0..3 {
            let run = rig.run(HookId::XdpWire, &other)?;
            assert_eq!((run.action, run.outcome), (Action::Next, "left_to_tc"));
        }
        assert!(rig.flows()?.is_empty());
        transmit(&mut rig, &own)?;
        assert_eq!(rig.flows()?.len(), 1);
    }
    Ok(())
}

#[test]
fn client_outside_the_source_ranges_is_dropped() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, ServiceFlags::SOURCE_RANGES)?;
        let frame = Frame::tcp(at(world.outside, 40_000), frontend, SYN).build();
        let run = rig.run(HookId::XdpWire, &frame)?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "source_range"));
        assert_eq!(rig.flows()?.len(), 0);
    }
    Ok(())
}

/// Packets without a route, or with a route over another device, are passed to tc.
#[test]
fn packet_with_a_route_over_another_device_is_passed_to_tc() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world, frontend) = node(family, 0)?;
        let client = at(world.outside, 40_000);
        ip(&format!("route replace blackhole {}", world.wire_pod))?;
        let frame = Frame::tcp(client, frontend, SYN).build();
        assert_eq!(rig.run(HookId::XdpWire, &frame)?.outcome, "left_to_tc");
        ip("link add wire2 type veth peer name wire3")?;
        ip("link set wire3 up")?;
        ip("link set wire2 up")?;
        let other = if family == Family::V4 { "172.30.0.9" } else { "fd00:30::9" };
        let bits = if family == Family::V4 { 24 } else { 64 };
        let own = if family == Family::V4 { "172.30.0.1" } else { "fd00:30::1" };
        ip(&format!("addr add {own}/{bits} dev wire2"))?;
        ip(&format!("neigh replace {other} lladdr 02:00:00:00:00:09 nud permanent dev wire2"))?;
        ip(&format!("route replace {} via {other} dev wire2", world.wire_pod))?;
        assert_eq!(rig.run(HookId::XdpWire, &frame)?.outcome, "left_to_tc");
    }
    Ok(())
}
