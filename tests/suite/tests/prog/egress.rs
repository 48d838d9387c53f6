//! Packets between pods and machines outside of the cluster, past the kernel's stack and through
//! it.

use std::net::SocketAddr;

use anyhow::Result;
use dataplane_common::{abi::NodeConfig, net::Protocol, reason::HookId};
use dataplane_testkit::prog::{
    Action, Family, Frame, MARK, POD_MAC, Rig, World, at, ip, per_packet_udp, rig_with, uplink,
};

/// The node has a default route by the uplink, on which the programs run.
fn with_uplink(family: Family, node: &NodeConfig) -> Result<(Rig, World)> {
    let (mut rig, world) = rig_with(family, node)?;
    uplink(&[family])?;
    rig.device(rig.ifindex, "172.18.0.2".parse()?, "fd00:18::2".parse()?)?;
    Ok((rig, world))
}

/// A pod's packet to the outside.
fn request(world: &World, protocol: u8) -> Frame {
    let (pod, outside) = (at(world.pod, 40_000), at(world.outside, 443));
    if protocol == Protocol::TCP { Frame::tcp(pod, outside, 0x02) } else { Frame::udp(pod, outside) }
}

/// The answer to it, as masqueraded.
fn answer(world: &World, protocol: u8, masqueraded: SocketAddr) -> Frame {
    let outside = at(world.outside, 443);
    if protocol == Protocol::TCP {
        Frame::tcp(outside, masqueraded, 0x12)
    } else {
        Frame::udp(outside, masqueraded)
    }
}

#[test]
fn pod_leaves_by_the_kernels_route_past_its_stack() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = with_uplink(family, &per_packet_udp())?;
        for protocol in [Protocol::TCP, Protocol::UDP] {
            let frame = request(&world, protocol);
            let mut sources = Vec::new();
            for packet in ["the first packet", "another"] {
                let run = rig.run(HookId::FromPod, &frame.build())?;
                assert_eq!((run.action, run.outcome), (Action::Redirect, "to_outside"), "{packet}");
                assert_eq!(run.mark, MARK, "to_wire must not translate it again");
                assert_eq!(run.packet().hop_limit, frame.hop_limit - 1);
                let (src, dst) = run.packet().tuple();
                assert_eq!((src.ip(), dst), (world.host, at(world.outside, 443)));
                sources.push(src);
            }
            assert_eq!(sources[0], sources[1], "one flow");
            let reply = rig.run(HookId::FromWire, &answer(&world, protocol, sources[0]).build())?;
            assert_eq!((reply.action, reply.outcome), (Action::Redirect, "to_pod"));
            assert_eq!(reply.packet().tuple().1, at(world.pod, 40_000));
            assert_eq!(reply.packet().eth_dst, POD_MAC);
        }
    }
    Ok(())
}

/// `egress: stack`.
#[test]
fn configured_stack_sees_both_directions() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = with_uplink(family, &per_packet_udp())?;
        rig.change_variables(|variables| variables.egress_stack = 1)?;
        for protocol in [Protocol::TCP, Protocol::UDP] {
            let frame = request(&world, protocol);
            let run = rig.run(HookId::FromPod, &frame.build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, "stack_outside"));
            assert_eq!(run.frame, frame.build(), "the stack sees the pod's address");
            let run = rig.run(HookId::ToWire, &frame.build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, "masqueraded"));
            let source = run.packet().tuple().0;

            let run = rig.run(HookId::FromWire, &answer(&world, protocol, source).build())?;
            assert_eq!((run.action, run.outcome, run.mark), (Action::Next, "stack_pod", 0));
            let (src, dst) = run.packet().tuple();
            assert_eq!((src, dst), (at(world.outside, 443), at(world.pod, 40_000)), "as the stack expects");
            let run = rig.run(HookId::ToPod, &run.frame)?;
            assert_eq!(run.action, Action::Next);
            assert_eq!(run.packet().tuple(), (src, dst));
        }
        // to the pod's own address
        let inbound = Frame::tcp(at(world.outside, 50_000), at(world.pod, 80), 0x02);
        let run = rig.run(HookId::FromWire, &inbound.build())?;
        assert_eq!((run.action, run.outcome, run.mark), (Action::Next, "stack_pod", 0));
        let answer = Frame::tcp(at(world.pod, 80), at(world.outside, 50_000), 0x12);
        let run = rig.run(HookId::FromPod, &answer.build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_outside"));
        // pods of other nodes are not outside
        let other = Frame::tcp(at(world.wire_pod, 50_000), at(world.pod, 80), 0x02);
        assert_eq!(rig.run(HookId::FromWire, &other.build())?.outcome, "to_pod");
    }
    Ok(())
}

/// Not only the first datagram of a client that addresses the pod itself, which makes the flow.
#[test]
fn datagrams_to_a_pod_take_the_configured_stack() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = with_uplink(family, &per_packet_udp())?;
        let (client, pod) = (at(world.outside, 50_000), at(world.pod, 53));
        // from then on, packets to the pod may belong to flows
        rig.run(HookId::FromPod, &request(&world, Protocol::UDP).build())?;
        for (stack, way, back) in [(1, "stack_pod", "stack_outside"), (0, "to_pod", "to_outside")] {
            rig.change_variables(|variables| variables.egress_stack = stack)?;
            for _ in 0..3 {
                let run = rig.run(HookId::FromWire, &Frame::udp(client, pod).build())?;
                assert_eq!((run.outcome, run.packet().tuple()), (way, (client, pod)));
                let run = rig.run(HookId::FromPod, &Frame::udp(pod, client).build())?;
                assert_eq!((run.outcome, run.packet().tuple()), (back, (pod, client)));
            }
        }
    }
    Ok(())
}

/// A connection keeps its port when the setting changes, and its answers follow.
#[test]
fn setting_changes_under_a_connection() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = with_uplink(family, &per_packet_udp())?;
        let source = rig.run(HookId::FromPod, &request(&world, Protocol::TCP).build())?.packet().tuple().0;
        let established = Frame::tcp(at(world.pod, 40_000), at(world.outside, 443), 0x10).build();
        let answer = answer(&world, Protocol::TCP, source).build();
        for (stack, way, back) in [(1, "stack_outside", "stack_pod"), (0, "to_outside", "to_pod")] {
            rig.change_variables(|variables| variables.egress_stack = stack)?;
            let run = rig.run(HookId::FromPod, &established)?;
            assert_eq!(run.outcome, way);
            let run = if stack == 1 { rig.run(HookId::ToWire, &run.frame)? } else { run };
            assert_eq!(run.packet().tuple().0, source);
            assert_eq!(rig.run(HookId::FromWire, &answer)?.outcome, back);
        }
    }
    Ok(())
}

/// What only the stack can forward takes it in both directions, and a connection keeps its port
/// when its way changes.
#[test]
fn answers_follow_the_way_of_the_pods_packets() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = with_uplink(family, &per_packet_udp())?;
        let syn = request(&world, Protocol::TCP);
        let established = Frame::tcp(at(world.pod, 40_000), at(world.outside, 443), 0x10);
        let source = rig.run(HookId::FromPod, &syn.build())?.packet().tuple().0;
        let answer = answer(&world, Protocol::TCP, source).build();
        assert_eq!(rig.run(HookId::FromWire, &answer)?.outcome, "to_pod");

        ip(&format!("route add prohibit {}", world.outside))?;
        let run = rig.run(HookId::FromPod, &established.build())?;
        assert_eq!((run.outcome, run.frame), ("stack_outside", established.build()));
        let run = rig.run(HookId::ToWire, &established.build())?;
        assert_eq!((run.outcome, run.packet().tuple().0), ("masqueraded", source));
        assert_eq!(rig.run(HookId::FromWire, &answer)?.outcome, "stack_pod");

        ip(&format!("route del prohibit {}", world.outside))?;
        let run = rig.run(HookId::FromPod, &established.build())?;
        assert_eq!((run.outcome, run.packet().tuple().0), ("to_outside", source));
        assert_eq!(rig.run(HookId::FromWire, &answer)?.outcome, "to_pod");
    }
    Ok(())
}

/// Each of these has no way past the stack.
#[test]
fn packet_that_needs_the_stack_takes_it() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = with_uplink(family, &per_packet_udp())?;
        let frame = request(&world, Protocol::UDP);
        let route =
            |change: &str| ip(&format!("-{} route {change}", if family == Family::V4 { 4 } else { 6 }));
        assert_eq!(rig.run(HookId::FromPod, &frame.build())?.outcome, "to_outside");

        let expiring = Frame { hop_limit: 1, ..frame.clone() };
        let run = rig.run(HookId::FromPod, &expiring.build())?;
        assert_eq!((run.outcome, run.frame), ("stack_outside", expiring.build()), "time exceeded");

        // answers to such a source arrive by the stack
        let allowed = world.exempt;
        rig.allow_source(11, (allowed, if allowed.is_ipv4() { 32 } else { 128 }))?;
        let routed = Frame::udp(at(allowed, 40_000), at(world.outside, 443));
        let run = rig.run(HookId::FromPod, &routed.build())?;
        assert_eq!((run.outcome, run.frame), ("stack_outside", routed.build()), "an allowed source");

        let large = Frame { payload: vec![7; 1_600], ..frame.clone() };
        let run = rig.run(HookId::FromPod, &large.build())?;
        assert_eq!((run.outcome, run.frame), ("stack_outside", large.build()), "above the MTU");

        // it has no programs
        let (own, router) = if world.host.is_ipv4() {
            ("10.77.0.1/24", "10.77.0.9")
        } else {
            ("fd00:77::1/64", "fd00:77::9")
        };
        ip(&format!("addr add {own} dev wire1"))?;
        ip(&format!("route replace {} via {router} dev wire1", world.outside))?;
        assert_eq!(rig.run(HookId::FromPod, &frame.build())?.outcome, "stack_outside", "another device");
        ip(&format!("route del {}", world.outside))?;
        route("del default")?;
        assert_eq!(rig.run(HookId::FromPod, &frame.build())?.outcome, "stack_outside", "no route");
    }
    Ok(())
}

#[test]
fn excepted_destination_leaves_untranslated() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = with_uplink(family, &per_packet_udp())?;
        let frame = Frame::udp(at(world.pod, 40_000), at(world.exempt, 53));
        let run = rig.run(HookId::FromPod, &frame.build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_outside"));
        assert_eq!(run.packet().tuple(), (at(world.pod, 40_000), at(world.exempt, 53)));
        // an answer to a client that has addressed the pod itself
        let answer = Frame::tcp(at(world.pod, 80), at(world.outside, 50_000), 0x12);
        let run = rig.run(HookId::FromPod, &answer.build())?;
        assert_eq!((run.outcome, run.packet().src), ("to_outside", world.pod));
    }
    Ok(())
}
