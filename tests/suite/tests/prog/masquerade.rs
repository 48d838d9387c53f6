//! Masquerade of packets from pods to the outside, and of the replies.

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, MARK, POD_MAC, at, rig};

#[test]
fn pod_is_masqueraded_and_the_reply_reaches_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (pod, outside) = (at(world.pod, 40_000), at(world.outside, 443));
        for frame in [Frame::tcp(pod, outside, 0x02), Frame::udp(pod, outside)] {
            let run = rig.run(HookId::FromPod, &frame.build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, "stack_outside"), "the kernel routes it");
            let run = rig.run(HookId::ToWire, &frame.build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, "masqueraded"));
            let (src, dst) = run.packet().tuple();
            assert_eq!((src.ip(), dst), (world.host, outside));
            assert!((61_000..=61_999).contains(&src.port()), "{src}");
            // the source is replaced at egress only: the stack drops received packets with its own
            // source address
            let next = rig.run(HookId::FromPod, &frame.build())?;
            assert_eq!(
                (next.outcome, next.frame),
                ("stack_outside", frame.build()),
                "packet of an existing flow"
            );

            let reply = match frame.protocol {
                Protocol::TCP => Frame::tcp(outside, src, 0x12),
                _ => Frame::udp(outside, src),
            };
            let run = rig.run(HookId::FromWire, &reply.build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, "stack_pod"), "the way of the request");
            assert_eq!(run.packet().tuple(), (outside, pod));
        }
    }
    Ok(())
}

/// A node with several uplinks: the source is the address of the device by which a packet leaves.
#[test]
fn translated_source_is_the_address_of_the_leaving_device() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let wire = rig.ifindex;
        // without a row the node's address
        let first = rig.run(HookId::ToWire, &Frame::udp(at(world.pod, 1), at(world.outside, 53)).build())?;
        assert_eq!(first.packet().src, world.host);
        // the rig's native routes leave by device 2
        for device in [wire, 2] {
            rig.device(device, "203.0.113.77".parse()?, "2001:db8:77::77".parse()?)?;
        }
        let own: std::net::IpAddr =
            if family == Family::V4 { "203.0.113.77" } else { "2001:db8:77::77" }.parse()?;
        let run = rig.run(HookId::ToWire, &Frame::udp(at(world.pod, 2), at(world.outside, 53)).build())?;
        assert_eq!((run.outcome, run.packet().src), ("masqueraded", own));
        let reply = Frame::udp(at(world.outside, 53), run.packet().tuple().0).build();
        assert_eq!(rig.run(HookId::FromWire, &reply)?.packet().dst, world.pod);
        let run =
            rig.run(HookId::FromWire, &Frame::tcp(at(world.outside, 9), world.service, 0x02).build())?;
        assert_eq!((run.outcome, run.packet().src), ("to_wire", own), "to a backend on another node");
    }
    Ok(())
}

/// The metadata address of clouds is link-local, but packets of pods to it leave the node.
#[test]
fn link_local_metadata_address_is_masqueraded() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let (pod, metadata) = (at(world.pod, 40_000), "169.254.169.254:80".parse()?);
    let request = Frame::tcp(pod, metadata, 0x02);
    assert_eq!(rig.run(HookId::FromPod, &request.build())?.outcome, "stack_link_local");
    let run = rig.run(HookId::ToWire, &request.build())?;
    assert_eq!((run.outcome, run.packet().src), ("masqueraded", world.host));
    let reply = Frame::tcp(metadata, run.packet().tuple().0, 0x12);
    let run = rig.run(HookId::FromWire, &reply.build())?;
    assert_eq!((run.outcome, run.packet().tuple()), ("stack_pod", (metadata, pod)));
    // packets of the host to its link are not masqueraded
    let neighbour = Frame::udp(at(world.host, 5_353), "224.0.0.251:5353".parse()?);
    assert_eq!(rig.run(HookId::ToWire, &neighbour.build())?.outcome, "stack_link_local");
    Ok(())
}

/// ICMP messages without a known identifier: only the address is rewritten.
#[test]
fn other_icmp_messages_are_masqueraded_by_address_only() -> Result<()> {
    const TIMESTAMP: (u8, u8) = (13, 0);
    let (mut rig, world) = rig(Family::V4)?;
    let request = Frame { icmp: TIMESTAMP, ..Frame::ping(world.pod, world.outside, 7) };
    let run = rig.run(HookId::ToWire, &request.build())?;
    assert_eq!((run.outcome, run.packet().src), ("masqueraded", world.host));
    let reply = Frame { icmp: (14, 0), ..Frame::ping(world.outside, world.host, 7) };
    let run = rig.run(HookId::FromWire, &reply.build())?;
    assert_eq!((run.outcome, run.packet().dst), ("stack_pod", world.pod));
    Ok(())
}

#[test]
fn pings_of_two_pods_get_different_identifiers() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let out = |rig: &mut dataplane_testkit::prog::Rig, pod| -> Result<u16> {
            let run = rig.run(HookId::ToWire, &Frame::ping(pod, world.outside, 7).build())?;
            assert_eq!(run.outcome, "masqueraded");
            assert_eq!(run.packet().src, world.host);
            Ok(run.packet().src_port)
        };
        let (first, second) = (out(&mut rig, world.pod)?, out(&mut rig, world.other_pod)?);
        assert_ne!(first, second, "two pods ping the same address with the same identifier");
        for (id, pod) in [(first, world.pod), (second, world.other_pod)] {
            let run = rig.run(HookId::FromWire, &Frame::pong(world.outside, world.host, id).build())?;
            assert_eq!(run.outcome, "stack_pod");
            assert_eq!((run.packet().dst, run.packet().dst_port), (pod, 7));
        }
    }
    Ok(())
}

#[test]
fn excepted_destinations_see_the_pod_address() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for dst in [world.exempt, world.wire_pod] {
            let frame = Frame::tcp(at(world.pod, 1), at(dst, 2), 0x02).build();
            let run = rig.run(HookId::ToWire, &frame)?;
            assert_eq!((run.outcome, run.frame), ("delivered", frame));
        }
    }
    Ok(())
}

#[test]
fn reply_of_a_backend_outside_is_translated_back_twice() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, frontend, backend) =
            (at(world.pod, 40_000), at(world.service.ip(), 99), at(world.outside, 9_000));
        rig.service(frontend, Protocol::TCP, 210, &[backend], 0)?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, frontend, 0x02).build())?;
        assert_eq!((run.outcome, run.packet().tuple()), ("stack_outside", (client, backend)));
        let run = rig.run(HookId::ToWire, &run.frame)?;
        assert_eq!(run.outcome, "masqueraded");
        let node = run.packet().tuple().0;
        let run = rig.run(HookId::FromWire, &Frame::tcp(backend, node, 0x12).build())?;
        // connection tracking saw the pod's packet with the backend as its destination
        assert_eq!((run.outcome, run.packet().tuple()), ("stack_pod", (backend, client)));
        let run = rig.run(HookId::ToPod, &run.frame)?;
        assert_eq!((run.outcome, run.packet().tuple()), ("restored", (frontend, client)));
    }
    Ok(())
}

#[test]
fn flow_without_a_free_snat_port_is_dropped_as_ports_exhausted() -> Result<()> {
    use dataplane_common::abi::{MacAddr, NodeConfig, NodeFlags, NodeVariables, Port};
    use dataplane_testkit::prog::Rig;
    let node = NodeConfig {
        host_mac: MacAddr::new([2; 6]),
        snat_first: Port::new(61_000),
        snat_last: Port::new(61_001),
        flow_slots: 64,
        flags: NodeFlags::MASQUERADE,
        mark: MARK,
        ..NodeConfig::default()
    };
    let ipv4 = "172.18.0.2".parse::<std::net::IpAddr>()?.into();
    let mut rig = Rig::with_config(&node, &NodeVariables { ipv4, ..NodeVariables::default() })?;
    let pod = "10.1.0.2".parse()?;
    rig.pod(pod, 11, POD_MAC)?;
    rig.host("172.18.0.2".parse()?)?;
    let outside = at("192.0.2.1".parse()?, 53);
    let mut outcomes = Vec::new();
    for port in 1..=12 {
        outcomes.push(rig.run(HookId::ToWire, &Frame::udp(at(pod, port), outside).build())?.outcome);
    }
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == "masqueraded").count(), 2);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == "ports_exhausted").count(), 10);
    // another destination has the whole range again
    let elsewhere = at("192.0.2.2".parse()?, 53);
    assert_eq!(rig.run(HookId::ToWire, &Frame::udp(at(pod, 99), elsewhere).build())?.outcome, "masqueraded");
    assert_eq!(rig.flows()?.len(), 3, "a rejected flow leaves no row");
    Ok(())
}
