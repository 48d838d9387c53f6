//! Pods that talk to the outside, and what comes back.

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, POD_MAC, at, rig};

#[test]
fn a_pod_goes_out_as_its_node_and_the_reply_finds_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (pod, outside) = (at(world.pod, 40_000), at(world.outside, 443));
        for frame in [Frame::tcp(pod, outside, 0x02), Frame::udp(pod, outside)] {
            let run = rig.run(HookId::FromPod, &frame.build())?;
            assert_eq!(
                (run.action, run.outcome),
                (Action::Next, "stack_outside"),
                "the kernel chooses the way"
            );
            let run = rig.run(HookId::ToWire, &frame.build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, "masqueraded"));
            let (src, dst) = run.packet().tuple();
            assert_eq!((src.ip(), dst), (world.host, outside));
            assert!((61_000..=61_999).contains(&src.port()), "{src}");
            // with the node's source, the kernel would take it for a packet that claims to come from itself
            let next = rig.run(HookId::FromPod, &frame.build())?;
            assert_eq!((next.outcome, next.frame), ("stack_outside", frame.build()), "known flow");

            let reply = match frame.protocol {
                Protocol::TCP => Frame::tcp(outside, src, 0x12),
                _ => Frame::udp(outside, src),
            };
            let run = rig.run(HookId::FromWire, &reply.build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
            assert_eq!(run.packet().tuple(), (outside, pod));
            assert_eq!(run.packet().eth_dst, POD_MAC);
        }
    }
    Ok(())
}

/// Where clouds have what they tell their machines: the address of one link, and the way back from there is the node's.
#[test]
fn a_pod_asks_for_metadata_as_its_node() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let (pod, metadata) = (at(world.pod, 40_000), "169.254.169.254:80".parse()?);
    let asks = Frame::tcp(pod, metadata, 0x02);
    assert_eq!(rig.run(HookId::FromPod, &asks.build())?.outcome, "stack_link_local");
    let run = rig.run(HookId::ToWire, &asks.build())?;
    assert_eq!((run.outcome, run.packet().src), ("masqueraded", world.host));
    let reply = Frame::tcp(metadata, run.packet().tuple().0, 0x12);
    let run = rig.run(HookId::FromWire, &reply.build())?;
    assert_eq!((run.outcome, run.packet().tuple()), ("to_pod", (metadata, pod)));
    // to the other addresses of its link the host speaks for itself
    let neighbour = Frame::udp(at(world.host, 5_353), "224.0.0.251:5353".parse()?);
    assert_eq!(rig.run(HookId::ToWire, &neighbour.build())?.outcome, "stack_link_local");
    Ok(())
}

/// A message of ICMP without an identifier we know of has nothing to be rewritten but its address.
#[test]
fn other_messages_of_icmp_are_masqueraded_as_they_are() -> Result<()> {
    const TIMESTAMP: (u8, u8) = (13, 0);
    let (mut rig, world) = rig(Family::V4)?;
    let asks = Frame { icmp: TIMESTAMP, ..Frame::ping(world.pod, world.outside, 7) };
    let run = rig.run(HookId::ToWire, &asks.build())?;
    assert_eq!((run.outcome, run.packet().src), ("masqueraded", world.host));
    let reply = Frame { icmp: (14, 0), ..Frame::ping(world.outside, world.host, 7) };
    let run = rig.run(HookId::FromWire, &reply.build())?;
    assert_eq!((run.outcome, run.packet().dst), ("to_pod", world.pod));
    Ok(())
}

#[test]
fn a_ping_keeps_an_identifier_of_its_own() -> Result<()> {
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
            assert_eq!(run.outcome, "to_pod");
            assert_eq!((run.packet().dst, run.packet().dst_port), (pod, 7));
        }
    }
    Ok(())
}

#[test]
fn exempt_destinations_see_the_pod() -> Result<()> {
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
fn a_service_with_a_backend_outside_is_undone_twice() -> Result<()> {
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
        assert_eq!((run.outcome, run.packet().tuple()), ("to_pod", (frontend, client)));
    }
    Ok(())
}

#[test]
fn a_range_of_ports_in_use_is_exhausted_by_name() -> Result<()> {
    use dataplane_common::abi::{MacAddr, NodeAddresses, NodeConfig, NodeFlags, Port};
    use dataplane_testkit::prog::Rig;
    let node = NodeConfig {
        host_mac: MacAddr::new([2; 6]),
        snat_first: Port::new(61_000),
        snat_last: Port::new(61_001),
        flow_slots: 64,
        flags: NodeFlags::MASQUERADE,
        flow_probes: 8,
        ..NodeConfig::default()
    };
    let ipv4 = "172.18.0.2".parse::<std::net::IpAddr>()?.into();
    let mut rig = Rig::with_config(&node, &NodeAddresses { ipv4, ..NodeAddresses::default() })?;
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
    assert_eq!(rig.flows()?.len(), 3, "a refused flow leaves nothing behind");
    Ok(())
}
