//! Pings to the addresses of services are answered while a backend is ready, and a packet whose TTL
//! expires on its way to a backend is answered by the node.

use std::net::IpAddr;

use anyhow::Result;
use dataplane_common::{
    abi::{NodeFlags, RouteKind},
    net::Protocol,
    reason::HookId,
};
use dataplane_testkit::prog::{
    Action, Family, Frame, HOST_MAC, OVERLAY_MAC, Parsed, Rig, Run, World, at, node_config, rig, rig_with,
};

const SYN: u8 = 0x02;
const NODE_PORT: u16 = 30_080;
const SLOT: u32 = 200;
const SENDER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x77];

/// A load balancer address.
fn balancer(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([203, 0, 113, 80]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0xaaaa, 0, 0, 0, 0, 0x80]),
    }
}

/// Every hook that a ping to a service passes, with who sends it.
fn senders(world: &World) -> [(HookId, IpAddr); 5] {
    [
        (HookId::FromPod, world.pod),
        (HookId::FromWire, world.outside),
        (HookId::FromWire, world.wire_pod),
        (HookId::FromOverlay, world.overlay_pod),
        (HookId::ToWire, world.host),
    ]
}

/// Type and code of an ICMP message.
fn icmp(run: &Run, family: Family) -> [u8; 2] {
    let l4 = if family == Family::V4 { 34 } else { 54 };
    [run.frame[l4], run.frame[l4 + 1]]
}

#[test]
fn ping_to_an_address_with_a_ready_backend_is_answered_at_every_hook() -> Result<()> {
    for family in Family::BOTH {
        for range in [false, true] {
            let (mut rig, world) = rig(family)?;
            let cluster_ip = world.service.ip();
            rig.ready_cluster_ip(cluster_ip)?;
            rig.ready_external_ip(balancer(family))?;
            if range {
                let bits = if family == Family::V4 { 16 } else { 108 };
                rig.route((cluster_ip, bits), RouteKind::Services, None, 0)?;
            }
            for (hook, sender) in senders(&world) {
                for address in [cluster_ip, balancer(family)] {
                    // a hop limit of 1 is enough for the packet's destination
                    for hop_limit in [1, 255] {
                        let request = Frame { hop_limit, ..Frame::ping(sender, address, 7) };
                        let run = rig.run(hook, &request.build())?;
                        let context = format!("{hook:?} {sender} {address}");
                        assert_eq!(
                            (run.action, run.outcome),
                            (Action::Redirect, "echo_answered"),
                            "{context}"
                        );
                        assert_eq!(icmp(&run, family), if family == Family::V4 { [0, 0] } else { [129, 0] });
                        let (eth_dst, eth_src) = match hook {
                            HookId::FromOverlay => (OVERLAY_MAC, HOST_MAC),
                            _ => (SENDER_MAC, HOST_MAC),
                        };
                        let expected = Parsed {
                            eth_dst,
                            eth_src,
                            src: address,
                            dst: sender,
                            protocol: request.protocol,
                            hop_limit: 64,
                            src_port: 7,
                            dst_port: 7,
                            payload: request.payload,
                        };
                        assert_eq!(run.packet(), expected, "{context}");
                    }
                }
            }
            assert!(rig.flows()?.is_empty(), "an answered ping creates no flow");
        }
    }
    Ok(())
}

#[test]
fn checksum_of_the_whole_packet_follows_the_answer() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        rig.ready_cluster_ip(world.service.ip())?;
        let request = Frame { hop_limit: 9, ..Frame::ping(world.host, world.service.ip(), 7) };
        // `None`: this kernel cannot check
        let outcome = rig.run_checksum_complete(HookId::ToWire, &request.build())?;
        assert!(matches!(outcome, None | Some("echo_answered")), "{outcome:?}");
    }
    Ok(())
}

/// What happens to a ping that is not answered.
fn unanswered(hook: HookId) -> (Action, &'static str) {
    match hook {
        HookId::FromPod => (Action::Next, "stack_outside"),
        HookId::FromWire => (Action::Next, "stack_unmanaged"),
        HookId::FromOverlay => (Action::Drop, "no_endpoint"),
        _ => (Action::Next, "delivered"),
    }
}

#[test]
fn ping_to_an_address_without_a_ready_backend_is_not_answered() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        rig.cluster_ip(world.service.ip())?;
        for (hook, sender) in senders(&world) {
            for address in [world.service.ip(), balancer(family)] {
                let frame = Frame::ping(sender, address, 7).build();
                let run = rig.run(hook, &frame)?;
                assert_eq!((run.action, run.outcome), unanswered(hook), "{hook:?} {address}");
                assert_eq!(run.frame, frame);
            }
        }
    }
    Ok(())
}

#[test]
fn answering_pings_can_be_disabled() -> Result<()> {
    for family in Family::BOTH {
        let mut config = node_config();
        config.flags &= !NodeFlags::ANSWER_PING;
        let (mut rig, world) = rig_with(family, &config)?;
        rig.ready_cluster_ip(world.service.ip())?;
        for (hook, sender) in senders(&world) {
            let run = rig.run(hook, &Frame::ping(sender, world.service.ip(), 7).build())?;
            assert_eq!((run.action, run.outcome), unanswered(hook), "{hook:?}");
        }
    }
    Ok(())
}

/// Nothing but a whole echo request of one station is answered.
#[test]
fn other_messages_to_a_ready_address_are_not_answered() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let address = world.service.ip();
        rig.ready_cluster_ip(address)?;
        let ping = Frame::ping(world.outside, address, 7);
        let no_station: IpAddr = if family == Family::V4 { "0.0.0.0".parse()? } else { "::".parse()? };
        let other_code = Frame { icmp: (ping.icmp.0, 1), ..ping.clone() };
        let fragment = Frame { fragment: Some((0, true)), ..ping.clone() };
        let options = Frame {
            extra: if family == Family::V4 { vec![1; 4] } else { vec![ping.protocol, 0, 1, 4, 0, 0, 0, 0] },
            first_extension: (family == Family::V6).then_some(Protocol::DESTINATION),
            ..ping.clone()
        };
        for frame in [
            Frame::pong(world.outside, address, 7),
            Frame::ping(no_station, address, 7),
            other_code,
            fragment,
            options,
            Frame { protocol: 47, ..ping },
        ] {
            let run = rig.run(HookId::FromWire, &frame.build())?;
            assert_eq!(run.action, Action::Next, "{frame:?}: {}", run.outcome);
            assert_eq!(run.outcome, "stack_unmanaged", "{frame:?}");
        }
        // multicast, broadcast, loopback and link-local sources never come so far
        let groups: &[&str] = match family {
            Family::V4 => &["224.0.0.1", "255.255.255.255", "169.254.3.4", "127.0.0.1"],
            Family::V6 => &["ff02::1", "fe80::7", "::1"],
        };
        for source in groups {
            let run = rig.run(HookId::FromWire, &Frame::ping(source.parse()?, address, 7).build())?;
            assert_ne!(run.outcome, "echo_answered", "{source}");
        }
    }
    Ok(())
}

#[test]
fn xdp_leaves_pings_to_tc() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        rig.ready_cluster_ip(world.service.ip())?;
        let frame = Frame::ping(world.outside, world.service.ip(), 7).build();
        let run = rig.run(HookId::XdpWire, &frame)?;
        assert_eq!((run.action, run.outcome, run.frame), (Action::Next, "left_to_tc", frame));
    }
    Ok(())
}

/// A node with a node port and a load balancer address with the given backend.
fn rig_with_frontends(family: Family, backend: fn(&World) -> IpAddr) -> Result<(Rig, World)> {
    let (mut rig, world) = rig(family)?;
    rig.host_with_node_ports(world.host)?;
    let backends = [at(backend(&world), 8080)];
    for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
        let node_port = at(world.host, NODE_PORT);
        rig.service_with(node_port, protocol, SLOT, &backends, |key, _| *key = key.at_node())?;
        rig.service(at(balancer(family), 80), protocol, SLOT, &backends, 0)?;
    }
    Ok((rig, world))
}

/// A router discards the packet, and quotes it as its sender knows it.
fn assert_time_exceeded(run: &Run, family: Family, request: &[u8], world: &World) {
    assert_eq!((run.action, run.outcome), (Action::Redirect, "ttl_expired"));
    assert_eq!(icmp(run, family), if family == Family::V4 { [11, 0] } else { [3, 0] });
    let message = run.packet();
    assert_eq!(message.src, world.host, "the node");
    assert_eq!(message.payload, request[14..14 + message.payload.len()], "as the client sent it");
    assert!(message.payload.len() >= if family == Family::V4 { 28 } else { 48 }, "with its ports");
}

#[test]
fn traceroute_to_a_frontend_shows_the_node() -> Result<()> {
    let backends: [fn(&World) -> IpAddr; 3] =
        [|world| world.wire_pod, |world| world.overlay_pod, |world| world.pod];
    for family in Family::BOTH {
        for backend in backends {
            let (mut rig, world) = rig_with_frontends(family, backend)?;
            for frontend in [at(world.host, NODE_PORT), at(balancer(family), 80)] {
                let client = at(world.outside, 40_000);
                for hop_limit in [0, 1] {
                    let probe = Frame { hop_limit, ..Frame::tcp(client, frontend, SYN) }.build();
                    let xdp = rig.run(HookId::XdpWire, &probe)?;
                    assert_eq!((xdp.outcome, &xdp.frame), ("left_to_tc", &probe));
                    let run = rig.run(HookId::FromWire, &probe)?;
                    assert_time_exceeded(&run, family, &probe, &world);
                    assert_eq!(run.packet().dst, world.outside);
                }
                let run = rig.run(HookId::FromWire, &Frame::tcp(client, frontend, SYN).build())?;
                assert_eq!(run.action, Action::Redirect, "the next TTL reaches the backend");
                assert_eq!(run.packet().dst, backend(&world));
            }
        }
    }
    Ok(())
}

#[test]
fn traceroute_by_udp_and_sctp_shows_the_node() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig_with_frontends(family, |world| world.wire_pod)?;
        let (client, frontend) = (at(world.outside, 40_000), at(world.host, NODE_PORT));
        for frame in [Frame::udp(client, frontend), Frame::sctp(client, frontend, 1)] {
            let probe = Frame { hop_limit: 1, ..frame }.build();
            let run = rig.run(HookId::FromWire, &probe)?;
            assert_time_exceeded(&run, family, &probe, &world);
        }
    }
    Ok(())
}

/// The backend's side of the same path: the reply expires here, and the backend learns of it.
#[test]
fn expired_reply_of_a_backend_is_answered_to_the_backend() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig_with_frontends(family, |world| world.wire_pod)?;
        let (client, frontend) = (at(world.outside, 40_000), at(world.host, NODE_PORT));
        let forwarded = rig.run(HookId::FromWire, &Frame::udp(client, frontend).build())?.packet();
        let (source, backend) = forwarded.tuple();
        let reply = Frame { hop_limit: 1, ..Frame::udp(backend, source) }.build();
        let run = rig.run(HookId::FromWire, &reply)?;
        assert_time_exceeded(&run, family, &reply, &world);
        assert_eq!(run.packet().dst, world.wire_pod);
    }
    Ok(())
}

/// A destination takes what reaches it, whatever its TTL.
#[test]
fn backend_on_the_host_itself_gets_a_packet_with_ttl_1() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig_with_frontends(family, |world| world.host)?;
        let frontend = at(world.host, NODE_PORT);
        let probe = Frame { hop_limit: 1, ..Frame::tcp(at(world.outside, 40_000), frontend, SYN) }.build();
        let run = rig.run(HookId::FromWire, &probe)?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
        assert_eq!(run.packet().dst_port, 8080);
    }
    Ok(())
}

/// Both machines choose the identifiers of their own pings.
#[test]
fn pings_in_both_directions_may_have_one_identifier() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (pod, outside) = (world.pod, world.outside);
        let request = Frame::ping(outside, pod, 7).build();
        assert_eq!(rig.run(HookId::FromWire, &request)?.outcome, "to_pod");
        let run = rig.run(HookId::ToWire, &Frame::ping(pod, outside, 7).build())?;
        assert_eq!((run.outcome, run.packet().src), ("masqueraded", world.host));
        let id = run.packet().src_port;
        let run = rig.run(HookId::ToWire, &Frame::pong(pod, outside, 7).build())?;
        assert_eq!((run.packet().src, run.packet().src_port), (pod, 7), "the answer of the pod");
        let run = rig.run(HookId::FromWire, &Frame::pong(outside, world.host, id).build())?;
        assert_eq!((run.packet().dst, run.packet().src_port), (pod, 7), "the answer to the pod");
    }
    Ok(())
}
