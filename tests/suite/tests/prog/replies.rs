//! Answers of pods to clients outside keep the pod's address, refusals have a budget, and what is
//! the host's own passes unchanged.

use anyhow::Result;
use dataplane_common::{abi::FlowFlags, net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Action, Family, Frame, Metadata, at, rig};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;

/// A client outside that connects to a pod's address gets answers from that address.
#[test]
fn tcp_answer_of_a_pod_is_not_masqueraded() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (pod, client) = (at(world.pod, 8_080), at(world.outside, 40_000));
        for flags in [SYN_ACK, ACK, 0x18, 0x11, 0x04, 0x14] {
            let answer = Frame::tcp(pod, client, flags).build();
            let run = rig.run(HookId::ToWire, &answer)?;
            assert_eq!((run.outcome, run.frame), ("delivered", answer), "{flags:#04x}");
        }
        for flags in [SYN, 0xc2] {
            let run = rig.run(HookId::ToWire, &Frame::tcp(pod, client, flags).build())?;
            assert_eq!(run.outcome, "masqueraded", "a connection of the pod's own");
        }
        // and from then on by its flow
        let run = rig.run(HookId::ToWire, &Frame::tcp(pod, client, ACK).build())?;
        assert_eq!(run.outcome, "masqueraded");
    }
    Ok(())
}

#[test]
fn answer_without_a_handshake_is_told_by_the_flow_of_the_question() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (pod, client) = (at(world.pod, 53), at(world.outside, 40_000));
        let answers = [
            (Frame::udp(client, pod), Frame::udp(pod, client)),
            (Frame::ping(client.ip(), pod.ip(), 7), Frame::pong(pod.ip(), client.ip(), 7)),
            (
                Frame { protocol: 47, ..Frame::udp(client, pod) },
                Frame { protocol: 47, ..Frame::udp(pod, client) },
            ),
        ];
        for (question, answer) in answers {
            let run = rig.run(HookId::FromWire, &question.build())?;
            assert_eq!((run.outcome, run.packet().dst), ("to_pod", question.dst.ip()));
            let answer = answer.build();
            let run = rig.run(HookId::FromPod, &answer)?;
            assert_eq!((run.outcome, &run.frame), ("stack_outside", &answer));
            let run = rig.run(HookId::ToWire, &answer)?;
            assert_eq!((run.outcome, &run.frame), ("delivered", &answer), "protocol {}", question.protocol);
        }
        assert!(rig.flows()?.iter().all(|flow| flow.flags == FlowFlags::INBOUND | FlowFlags::OUTSIDE));
        // to another port of that client: the pod's own
        let run = rig.run(HookId::ToWire, &Frame::udp(pod, at(world.outside, 40_001)).build())?;
        assert_eq!(run.outcome, "masqueraded");
        // an answer to nothing is none of the pod's own conversations
        let pong = Frame::pong(world.pod, world.outside, 99).build();
        assert_eq!(rig.run(HookId::ToWire, &pong)?.outcome, "delivered");
    }
    Ok(())
}

#[test]
fn question_of_another_pod_or_to_a_masqueraded_tuple_makes_no_flow() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let pod = at(world.pod, 53);
        for client in [world.wire_pod, world.wire_node, world.exempt] {
            let run = rig.run(HookId::FromWire, &Frame::udp(at(client, 40_000), pod).build())?;
            assert_eq!(run.outcome, "to_pod");
        }
        assert_eq!(rig.flows()?, []);
        // the pod has talked to the client first, as the node
        let client = at(world.outside, 40_000);
        let first = rig.run(HookId::ToWire, &Frame::udp(pod, client).build())?;
        assert_eq!(rig.run(HookId::FromWire, &Frame::udp(client, pod).build())?.outcome, "to_pod");
        let second = rig.run(HookId::ToWire, &Frame::udp(pod, client).build())?;
        assert_eq!(second.packet().tuple(), first.packet().tuple(), "the same translation as before");
        assert_eq!(rig.flows()?.len(), 1);
    }
    Ok(())
}

/// The kernel's limits: one a second and six at once to a client outside, 1,000 a second and 50 at
/// once to all.
#[test]
fn refusals_have_a_budget() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let refused = |rig: &mut dataplane_testkit::prog::Rig, hook, client| -> Result<usize> {
            let mut refused = 0;
            for port in 0..80 {
                let request = Frame::tcp(at(client, 40_000 + port), world.empty_service, SYN).build();
                let run = rig.run(hook, &request)?;
                assert_eq!(run.outcome, "no_backend");
                refused += usize::from(run.action == Action::Redirect);
            }
            Ok(refused)
        };
        let one = refused(&mut rig, HookId::FromWire, world.outside)?;
        assert!((6..=9).contains(&one), "{one} refusals to one client");
        let other = refused(&mut rig, HookId::FromWire, world.exempt)?;
        assert!((6..=9).contains(&other), "{other} refusals to another client");
        // 80 packets take less than a second, of which each millisecond brings one more
        let pod = refused(&mut rig, HookId::FromPod, world.pod)?;
        assert!(pod >= 50, "{pod} refusals to a pod");
    }
    Ok(())
}

#[test]
fn group_and_unspecified_sources_get_no_refusal() -> Result<()> {
    for (family, sources) in [
        (Family::V4, ["0.0.0.0", "255.255.255.255", "224.0.0.7"]),
        (Family::V6, ["::", "ff02::7", "fe80::7"]),
    ] {
        let (mut rig, world) = rig(family)?;
        for source in sources {
            let request = Frame::udp(at(source.parse()?, 40_000), world.empty_service).build();
            let run = rig.run(HookId::FromWire, &request)?;
            assert_ne!(run.action, Action::Redirect, "{source}: {}", run.outcome);
        }
    }
    Ok(())
}

/// What a virtual machine or a packet socket sent: the kernel has not counted the segments yet.
#[test]
fn gso_packet_without_counted_segments_is_not_too_big() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let payload = vec![0; 3_000];
        let frame = Frame { payload, ..Frame::tcp(at(world.pod, 1), at(world.overlay_pod, 2), ACK) }.build();
        let plain = rig.metadata(HookId::FromPod, &frame)?;
        for (gso_size, gso_segs, outcome) in
            [(0, 0, "stack_too_big"), (1_400, 0, "to_overlay"), (1_400, 3, "to_overlay")]
        {
            let run = rig.run_with(HookId::FromPod, &frame, Metadata { gso_size, gso_segs, ..plain })?;
            assert_eq!(run.outcome, outcome, "{gso_size} {gso_segs}");
        }
    }
    Ok(())
}

/// The host is not a router of its own packets.
#[test]
fn packet_of_the_host_leaves_with_its_own_ttl() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for (frontend, outcome) in [(world.service, "to_wire"), (world.own_service, "to_pod")] {
            for hop_limit in [1, 64] {
                let frame = Frame { hop_limit, ..Frame::udp(at(world.host, 40_000), frontend) };
                let run = rig.run(HookId::ToWire, &frame.build())?;
                assert_eq!((run.outcome, run.packet().hop_limit), (outcome, hop_limit));
            }
        }
    }
    Ok(())
}

/// Fragments to the host that belong to no service need not arrive in order.
#[test]
fn fragment_to_the_host_passes_unchanged() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        rig.host_with_node_ports(world.host)?;
        let udp = Frame::udp(at(world.outside, 500), at(world.host, 500));
        let later = |protocol: u8, length: usize| {
            let payload = vec![7; length];
            Frame { protocol, payload, fragment: Some((180, false)), ..udp.clone() }.build()
        };
        // too long to be stored until the first one comes
        let run = rig.run(HookId::FromWire, &later(Protocol::UDP, 3_000))?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
        // no ports to wait for (ESP)
        let run = rig.run(HookId::FromWire, &later(50, 1_000))?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
        assert_eq!(rig.pending_fragments()?, []);
    }
    Ok(())
}
