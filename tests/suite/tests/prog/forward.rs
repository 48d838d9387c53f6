//! Packets without translation: every hook forwards them without a flow lookup.

use anyhow::Result;
use dataplane_common::reason::HookId;
use dataplane_testkit::prog::{
    Action, Family, Frame, OTHER_POD_MAC, at,
    frame::{HOST_MAC, OVERLAY_MAC},
    rig,
};

#[test]
fn packet_between_pods_of_a_node_is_redirected_to_the_pod() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frame = Frame::tcp(at(world.pod, 1000), at(world.other_pod, 80), 0x02);
        let run = rig.run(HookId::FromPod, &frame.build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
        let packet = run.packet();
        assert_eq!((packet.eth_dst, packet.eth_src), (OTHER_POD_MAC, HOST_MAC));
        assert_eq!(packet.hop_limit, 63);
        assert_eq!(packet.tuple(), (frame.src, frame.dst));
        assert!(rig.flows()?.is_empty(), "forwarding creates no flow");
    }
    Ok(())
}

#[test]
fn packet_to_a_pod_of_another_node_goes_to_the_uplink_or_the_overlay() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for (dst, outcome) in
            [(world.wire_pod, "to_wire"), (world.wire_node, "to_wire"), (world.overlay_pod, "to_overlay")]
        {
            let frame = Frame::udp(at(world.pod, 1000), at(dst, 53));
            let run = rig.run(HookId::FromPod, &frame.build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, outcome));
            assert_eq!(run.packet().tuple(), (frame.src, frame.dst));
            assert_eq!(run.packet().hop_limit, 63);
            if outcome == "to_overlay" {
                assert_eq!((run.packet().eth_dst, run.packet().eth_src), (OVERLAY_MAC, HOST_MAC));
            }
        }
        assert!(rig.flows()?.is_empty());
    }
    Ok(())
}

#[test]
fn pings_between_pods_are_forwarded() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let run = rig.run(HookId::FromPod, &Frame::ping(world.pod, world.other_pod, 7).build())?;
        assert_eq!(run.outcome, "to_pod");
        let run = rig.run(HookId::FromWire, &Frame::pong(world.wire_pod, world.pod, 7).build())?;
        assert_eq!(run.outcome, "to_pod");
    }
    Ok(())
}

#[test]
fn packet_from_a_pod_to_its_node_goes_to_the_stack_unchanged() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frame = Frame::tcp(at(world.pod, 1000), at(world.host, 10_250), 0x02).build();
        let run = rig.run(HookId::FromPod, &frame)?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
        assert_eq!(run.frame, frame);
    }
    Ok(())
}

#[test]
fn packet_to_an_unassigned_address_is_dropped_as_no_endpoint() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let run = rig.run(HookId::FromPod, &Frame::udp(at(world.pod, 1), at(world.unassigned, 2)).build())?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "no_endpoint"));
        rig.remove_endpoint(world.other_pod)?;
        let run = rig.run(HookId::FromPod, &Frame::udp(at(world.pod, 1), at(world.other_pod, 2)).build())?;
        assert_eq!(run.outcome, "no_endpoint", "the address of a removed pod");
    }
    Ok(())
}

#[test]
fn packets_from_other_nodes_are_redirected_to_the_pod() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for (hook, sender) in [(HookId::FromWire, world.wire_pod), (HookId::FromOverlay, world.overlay_pod)] {
            let frame = Frame::tcp(at(sender, 1000), at(world.other_pod, 80), 0x02);
            let run = rig.run(hook, &frame.build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
            assert_eq!(run.packet().eth_dst, OTHER_POD_MAC);
            assert_eq!(run.packet().tuple(), (frame.src, frame.dst));
        }
    }
    Ok(())
}

#[test]
fn packets_to_unmanaged_addresses_go_to_the_stack() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let run =
            rig.run(HookId::FromWire, &Frame::udp(at(world.outside, 1), at(world.exempt, 2)).build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_unmanaged"));
        let run = rig.run(HookId::FromWire, &Frame::udp(at(world.outside, 1), at(world.host, 22)).build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
        // another node sent it through the tunnel, but the address is not here
        let run = rig
            .run(HookId::FromOverlay, &Frame::udp(at(world.overlay_pod, 1), at(world.outside, 2)).build())?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "no_endpoint"));
    }
    Ok(())
}

#[test]
fn packet_with_an_expired_ttl_goes_to_the_stack() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for dst in [world.other_pod, world.wire_pod, world.overlay_pod] {
            let frame = Frame { hop_limit: 1, ..Frame::udp(at(world.pod, 1), at(dst, 2)) }.build();
            let run = rig.run(HookId::FromPod, &frame)?;
            assert_eq!((run.action, run.outcome), (Action::Next, "stack_ttl_expired"));
            assert_eq!(run.frame, frame, "the kernel's ICMP error quotes the unchanged packet");
        }
    }
    Ok(())
}

#[test]
fn packet_above_the_path_mtu_goes_to_the_stack() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let headers = if family == Family::V4 { 28 } else { 48 };
        for (size, outcome) in [(1_450, "to_overlay"), (1_451, "stack_too_big")] {
            let payload = vec![0; size - headers];
            let frame = Frame { payload, ..Frame::udp(at(world.pod, 1), at(world.overlay_pod, 2)) };
            assert_eq!(rig.run(HookId::FromPod, &frame.build())?.outcome, outcome);
        }
    }
    Ok(())
}

#[test]
fn multicast_of_a_pod_and_neighbour_discovery_of_the_wire_go_to_the_stack() -> Result<()> {
    let (mut rig, world) = rig(Family::V6)?;
    let mut arp = [HOST_MAC, [2; 6]].concat();
    arp.extend([0x08, 0x06]);
    arp.extend([0; 46]);
    assert_eq!(rig.run(HookId::FromWire, &arp)?.outcome, "stack_not_ip");
    for (source, outcome) in [(world.outside, "stack_unmanaged"), (world.host, "stack_link_local")] {
        let advertisement = Frame { icmp: (136, 0), ..Frame::ping(source, "ff02::1".parse()?, 0) };
        let run = rig.run(HookId::FromWire, &advertisement.build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, outcome), "also a claim to the node's address");
    }
    let group = Frame::udp(at("10.1.0.2".parse()?, 1), at("224.0.0.251".parse()?, 5353));
    assert_eq!(rig.run(HookId::FromPod, &group.build())?.outcome, "stack_link_local");
    Ok(())
}

#[test]
fn packets_of_the_host_pass_unchanged() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let to_pod = Frame::tcp(at(world.host, 40_000), at(world.pod, 80), 0x02).build();
        let run = rig.run(HookId::ToPod, &to_pod)?;
        assert_eq!((run.action, run.outcome, &run.frame), (Action::Next, "delivered", &to_pod));
        let out = Frame::tcp(at(world.host, 40_000), at(world.outside, 443), 0x02).build();
        let run = rig.run(HookId::ToWire, &out)?;
        assert_eq!((run.action, run.outcome, &run.frame), (Action::Next, "delivered", &out));
        let overlay = Frame::tcp(at(world.host, 40_000), at(world.overlay_pod, 443), 0x02).build();
        let run = rig.run(HookId::ToOverlay, &overlay)?;
        assert_eq!((run.action, run.outcome), (Action::Next, "delivered"));
        // all overlay devices have the same MAC address: a frame from that address would be taken
        // for a loop
        assert_eq!((run.packet().eth_dst, run.packet().eth_src), (OVERLAY_MAC, HOST_MAC));
        let run = rig.run(HookId::ToOverlay, &Frame::udp(at(world.host, 1), at(world.outside, 2)).build())?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "no_endpoint"));
    }
    Ok(())
}

#[test]
fn packet_to_a_pod_whose_device_is_down_is_dropped() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        rig.pod_down(world.other_pod, 12)?;
        let run = rig.run(HookId::FromPod, &Frame::udp(at(world.pod, 1), at(world.other_pod, 2)).build())?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "device_down"));
    }
    Ok(())
}
