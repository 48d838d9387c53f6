//! SCTP in packet order: ports and checksum are rewritten, associations keep their backend, new
//! ones select. The CRC-32C of every output packet is checked.

use anyhow::Result;
use dataplane_common::{abi::ServiceFlags, flow::State, net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Parsed, Rig, World, at, rig};

const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const HEARTBEAT: u8 = 4;
const ABORT: u8 = 6;
const SHUTDOWN_COMPLETE: u8 = 14;

/// Bytes of the Ethernet and IP headers.
const fn headers(family: Family) -> usize {
    match family {
        Family::V4 => 14 + 20,
        Family::V6 => 14 + 40,
    }
}

#[test]
fn association_with_a_service_is_translated_from_init_to_shutdown() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let run = rig.run(HookId::FromPod, &Frame::sctp(client, world.service, INIT).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_wire"));
        assert_eq!(run.packet().tuple(), (client, backend));
        assert_eq!(run.packet().payload, b"payload");
        assert_eq!(rig.flows()?[0].state, State::HalfOpen as u32);

        let run = rig.run(HookId::FromWire, &Frame::sctp(backend, client, INIT_ACK).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
        assert_eq!(run.packet().tuple(), (world.service, client));
        assert_eq!(rig.flows()?[0].state, State::Answered as u32);

        let run = rig.run(HookId::FromPod, &Frame::sctp(client, world.service, DATA).build())?;
        assert_eq!(run.packet().tuple(), (client, backend));
        assert_eq!(rig.flows()?[0].state, State::Established as u32);
        // without the chunks in front of it, it is as good as an ABORT
        rig.run(HookId::FromPod, &Frame::sctp(client, world.service, SHUTDOWN_COMPLETE).build())?;
        assert_eq!(rig.flows()?[0].state, State::Reset as u32);
        assert_eq!(rig.flows()?.len(), 1);
    }
    Ok(())
}

#[test]
fn checksum_is_updated_for_packets_of_any_length() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for len in (0..70).chain([255, 256, 1_023, 1_436, 2_900]) {
            let payload: Vec<u8> = (0..=250).cycle().take(len).collect();
            let frame =
                Frame { payload: payload.clone(), ..Frame::sctp(at(world.pod, 40_000), world.service, DATA) };
            let run = rig.run(HookId::FromPod, &frame.build())?;
            let packet = run.packet();
            assert_eq!((packet.tuple().1, packet.payload), (at(world.wire_pod, 8080), payload));
        }
    }
    Ok(())
}

/// A frame may have padding after the packet, and the packet may have options.
#[test]
fn checksum_covers_the_sctp_packet_only() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let frame = Frame::sctp(client, world.service, DATA).build();
        let run = rig.run(HookId::FromPod, &[&frame[..], &[0xee; 9]].concat())?;
        assert_eq!(run.packet().tuple(), (client, at(world.wire_pod, 8080)));
        assert!(run.frame.ends_with(&[0xee; 9]));

        let (extra, first_extension) = match family {
            Family::V4 => (vec![1; 8], None),
            // destination options: padding
            Family::V6 => (vec![Protocol::SCTP, 0, 1, 4, 0, 0, 0, 0], Some(Protocol::DESTINATION)),
        };
        let behind = Frame { extra, first_extension, ..Frame::sctp(client, world.service, DATA) };
        let run = rig.run(HookId::FromPod, &behind.build())?;
        let mut plain = rig.run(HookId::FromPod, &frame)?.frame;
        assert_eq!(run.frame[headers(family) + 8..], plain.split_off(headers(family)));
    }
    Ok(())
}

/// With checksum offload the pod leaves the field zero and the device computes the checksum.
#[test]
fn offloaded_checksum_stays_zero() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let frame = Frame { no_checksum: true, ..Frame::sctp(client, world.service, INIT) }.build();
        let run = rig.run(HookId::FromPod, &frame)?;
        assert_eq!(run.packet().tuple(), (client, at(world.wire_pod, 8080)));
        let (sent, came) = (&frame[headers(family)..], &run.frame[headers(family)..]);
        assert_eq!(came[8..12], [0; 4]);
        assert_eq!(came[4..], sent[4..], "only the ports change");
    }
    Ok(())
}

#[test]
fn packet_is_not_changed_when_port_and_target_port_are_equal() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frontend = at(world.service.ip(), 9_999);
        rig.service(frontend, Protocol::SCTP, 200, &[at(world.wire_pod, 9_999)], 0)?;
        let mut frame = Frame::sctp(at(world.pod, 40_000), frontend, INIT).build();
        // a wrong checksum stays wrong, so that the receiver detects it
        frame[headers(family) + 9] ^= 0x55;
        let run = rig.run(HookId::FromPod, &frame)?;
        assert_eq!(run.outcome, "to_wire");
        assert_eq!(run.frame[headers(family)..], frame[headers(family)..]);
    }
    Ok(())
}

#[test]
fn wrong_checksum_stays_wrong_after_translation() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let mut frame = Frame::sctp(at(world.pod, 40_000), world.service, DATA).build();
    *frame.last_mut().unwrap() ^= 1;
    let run = rig.run(HookId::FromPod, &frame)?;
    assert_eq!(run.outcome, "to_wire");
    assert_eq!(Parsed::read(&run.frame).unwrap_err(), "SCTP checksum is wrong");
    Ok(())
}

#[test]
fn services_of_different_protocols_at_one_port_are_separate() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let (client, frontend) = (at(world.pod, 40_000), at(world.service.ip(), 7_000));
    rig.service(frontend, Protocol::SCTP, 200, &[at(world.wire_pod, 1)], 0)?;
    rig.service(frontend, Protocol::TCP, 201, &[at(world.wire_pod, 2)], 0)?;
    let sctp = rig.run(HookId::FromPod, &Frame::sctp(client, frontend, INIT).build())?.packet();
    let tcp = rig.run(HookId::FromPod, &Frame::tcp(client, frontend, 0x02).build())?.packet();
    assert_eq!((sctp.dst_port, tcp.dst_port), (1, 2));
    assert_eq!(rig.run(HookId::FromPod, &Frame::udp(client, frontend).build())?.outcome, "stack_outside");
    Ok(())
}

#[test]
fn node_port_and_host_port_are_translated_to_local_and_remote_pods() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, host_port, node_port) =
            (at(world.outside, 40_000), at(world.host, 38_412), at(world.host, 30_412));
        let (here, there) = (at(world.pod, 8080), at(world.wire_pod, 8080));
        rig.host_with_node_ports(world.host)?;
        rig.service(host_port, Protocol::SCTP, 200, &[here], ServiceFlags::HOST_PORT)?;
        rig.service_with(node_port, Protocol::SCTP, 201, &[there], |key, _| *key = key.at_node())?;

        let run = rig.run(HookId::FromWire, &Frame::sctp(client, host_port, INIT).build())?;
        assert_eq!((run.outcome, run.packet().tuple()), ("to_pod", (client, here)));
        let run = rig.run(HookId::FromPod, &Frame::sctp(here, client, INIT_ACK).build())?;
        assert_eq!(run.packet().tuple(), (host_port, client));

        let run = rig.run(HookId::FromWire, &Frame::sctp(client, node_port, INIT).build())?;
        let (between, dst) = run.packet().tuple();
        assert_eq!((run.outcome, between.ip(), dst), ("to_wire", world.host, there));
        assert!((61_000..=61_999).contains(&between.port()), "an SNAT port: {between}");
        let run = rig.run(HookId::FromWire, &Frame::sctp(there, between, INIT_ACK).build())?;
        assert_eq!(run.packet().tuple(), (node_port, client));
    }
    Ok(())
}

#[test]
fn pods_are_masqueraded_with_different_snat_ports() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let outside = at(world.outside, 36_412);
        let mut ports = Vec::new();
        for pod in [world.pod, world.other_pod] {
            // both from the same port, as is usual in signalling
            let pod = at(pod, 36_412);
            let run = rig.run(HookId::ToWire, &Frame::sctp(pod, outside, INIT).build())?;
            let (src, dst) = run.packet().tuple();
            assert_eq!((run.outcome, src.ip(), dst), ("masqueraded", world.host, outside));
            ports.push(src.port());
            let run = rig.run(HookId::FromWire, &Frame::sctp(outside, src, INIT_ACK).build())?;
            assert_eq!((run.outcome, run.packet().tuple()), ("stack_pod", (outside, pod)));
        }
        assert_ne!(ports[0], ports[1]);
    }
    Ok(())
}

#[test]
fn hairpin_through_a_service_is_translated() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let run = rig.run(HookId::FromPod, &Frame::sctp(client, world.own_service, INIT).build())?;
        let (src, dst) = run.packet().tuple();
        assert_eq!((run.outcome, src.ip(), dst), ("to_pod", world.host, at(world.pod, 8080)));
        let run = rig.run(HookId::FromPod, &Frame::sctp(dst, src, INIT_ACK).build())?;
        assert_eq!((run.outcome, run.packet().tuple()), ("to_pod", (world.own_service, client)));
    }
    Ok(())
}

#[test]
fn init_to_a_service_without_backends_gets_port_unreachable() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        for no_checksum in [false, true] {
            // 16 bytes of fixed fields: the minimum of an INIT (RFC 9260 §3.3.2)
            let init = Frame {
                no_checksum,
                payload: vec![0xab; 16],
                ..Frame::sctp(client, world.empty_service, INIT)
            };
            let request = init.build();
            let run = rig.run(HookId::FromPod, &request)?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "no_backend"));
            let message = run.packet();
            assert_eq!((message.src, message.dst), (world.service.ip(), world.pod));
            let icmp = &run.frame[headers(family)..];
            assert_eq!(icmp[..2], if family == Family::V4 { [3, 3] } else { [1, 4] }, "port unreachable");
            // quoted up to the initiate tag, by which the sender matches it
            assert_eq!(message.payload, request[14..headers(family) + 20]);
        }
        rig.cluster_ip(world.service.ip())?;
        let other_port =
            Frame { payload: vec![0; 16], ..Frame::sctp(client, at(world.service.ip(), 9), INIT) };
        let run = rig.run(HookId::FromPod, &other_port.build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "no_port"));
        let abort = Frame { payload: vec![0; 16], ..Frame::sctp(client, world.empty_service, ABORT) };
        assert_eq!(rig.run(HookId::FromPod, &abort.build())?.action, Action::Drop);
        assert!(rig.flows()?.is_empty());
    }
    Ok(())
}

#[test]
fn association_keeps_its_removed_backend_and_a_new_one_selects() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, old) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        rig.run(HookId::FromPod, &Frame::sctp(client, world.service, INIT).build())?;
        rig.run(HookId::FromWire, &Frame::sctp(old, client, INIT_ACK).build())?;
        rig.service(world.service, Protocol::SCTP, 50, &[at(world.overlay_pod, 8080)], 0)?;
        rig.raise_generation(world.backend())?;
        for chunk in [DATA, HEARTBEAT] {
            let run = rig.run(HookId::FromPod, &Frame::sctp(client, world.service, chunk).build())?;
            assert_eq!(run.packet().dst, old.ip(), "associations to a removed pod drain");
        }
        let run = rig.run(HookId::FromPod, &Frame::sctp(client, world.service, INIT).build())?;
        assert_eq!((run.outcome, run.packet().dst), ("to_overlay", world.overlay_pod));
    }
    Ok(())
}

#[test]
fn icmp_errors_about_an_association_reach_the_client() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let sent = rig.run(HookId::FromPod, &Frame::sctp(client, world.service, INIT).build())?.frame;
        // the minimum quotes 8 bytes of the transport header (RFC 792)
        for carried in [headers(family) + 8, sent.len()] {
            let run = rig.run(
                HookId::FromWire,
                &Frame::too_big(world.wire_node, world.pod, &sent[..carried]).build(),
            )?;
            assert_eq!((run.outcome, run.packet().dst), ("to_pod", world.pod));
            let inside = &run.frame[headers(family) + 8..];
            let ports = &inside[headers(family) - 14..][..4];
            assert_eq!(ports, [40_000_u16.to_be_bytes(), 80_u16.to_be_bytes()].concat());
        }
    }
    Ok(())
}

/// The checksum covers the whole packet, which is not available in a fragment: fragments are
/// translated only if ports stay the same.
#[test]
fn fragments_are_translated_only_if_ports_stay_the_same() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, kept) = (at(world.pod, 40_000), at(world.service.ip(), 9_999));
        rig.service(kept, Protocol::SCTP, 200, &[at(world.wire_pod, 9_999)], 0)?;
        let [first, last] = two_fragments(kept, client);
        for fragment in [&first, &last] {
            let run = rig.run(HookId::FromPod, &fragment.build())?;
            assert_eq!(run.outcome, "to_wire");
            assert_eq!(destination(&run.frame, family), octets(&world));
        }
        let [first, last] = two_fragments(world.service, client);
        let run = rig.run(HookId::FromPod, &first.build())?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "fragment_checksum"));
        assert_eq!(rig.run(HookId::FromPod, &last.build())?.outcome, "to_wire");
    }
    Ok(())
}

fn two_fragments(service: std::net::SocketAddr, client: std::net::SocketAddr) -> [Frame; 2] {
    let whole = Frame { payload: vec![1; 48], id: service.port(), ..Frame::sctp(client, service, DATA) };
    // 16 bytes of headers and 16 of payload, then 32
    let first = Frame { payload: vec![1; 16], fragment: Some((0, true)), ..whole.clone() };
    let last = Frame { payload: vec![1; 32], fragment: Some((4, false)), ..whole };
    [first, last]
}

fn destination(frame: &[u8], family: Family) -> Vec<u8> {
    match family {
        Family::V4 => frame[30..34].to_vec(),
        Family::V6 => frame[38..54].to_vec(),
    }
}

fn octets(world: &World) -> Vec<u8> {
    match world.wire_pod {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// SCTP has its own flow hint: it adds no flow lookups for other protocols.
#[test]
fn sctp_flow_sets_only_the_sctp_flow_hint() -> Result<()> {
    let (mut rig, world): (Rig, World) = rig(Family::V4)?;
    rig.run(HookId::FromPod, &Frame::sctp(at(world.pod, 40_000), world.service, INIT).build())?;
    assert!(rig.may_have_flow(world.pod, Protocol::SCTP)?);
    assert!(!rig.may_have_flow(world.pod, Protocol::TCP)? && !rig.may_have_flow(world.pod, Protocol::UDP)?);
    Ok(())
}
