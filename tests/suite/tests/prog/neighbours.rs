//! Neighbour discovery and configuration by pods: answered for the gateway, discarded or dropped,
//! and never passed to the kernel, whose neighbour table all pods share.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use dataplane_common::{
    net::{ArpMessage, GATEWAY_V4, GATEWAY_V6},
    reason::HookId,
};
use dataplane_testkit::prog::{Action, Family, Frame, HOST_MAC, POD_MAC, World, at, rig};

/// An ARP request of the pod.
fn arp_request(target: Ipv4Addr) -> Vec<u8> {
    let mut frame = [[0xff; 6], POD_MAC].concat();
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(POD_MAC);
    frame.extend([10, 1, 0, 2]);
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

#[test]
fn arp_request_for_the_gateway_is_answered_and_others_are_discarded() -> Result<()> {
    let (mut rig, _) = rig(Family::V4)?;
    let run = rig.run(HookId::FromPod, &arp_request(GATEWAY_V4))?;
    assert_eq!((run.action, run.outcome), (Action::Redirect, "neighbour_answered"));
    let mut answer = [POD_MAC, HOST_MAC].concat();
    answer.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2]);
    answer.extend(HOST_MAC);
    answer.extend(GATEWAY_V4.octets());
    answer.extend(POD_MAC);
    answer.extend([10, 1, 0, 2]);
    assert_eq!(run.frame, answer);
    assert_eq!(size_of::<ArpMessage>() + 14, answer.len());
    for target in [Ipv4Addr::new(10, 1, 0, 3), Ipv4Addr::new(172, 18, 0, 2)] {
        let run = rig.run(HookId::FromPod, &arp_request(target))?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "neighbour_ignored"), "{target}");
    }
    Ok(())
}

/// A neighbour solicitation for `target`, with or without the option that names its sender.
fn solicitation(src: IpAddr, target: Ipv6Addr, option: bool) -> Result<Frame> {
    let mut payload = target.octets().to_vec();
    if option {
        payload.extend([1, 1]);
        payload.extend(POD_MAC);
    }
    let ping = Frame::ping(src, "ff02::1:ff00:1".parse()?, 0);
    Ok(Frame { icmp: (135, 0), hop_limit: 255, payload, ..ping })
}

#[test]
fn solicitation_for_the_gateway_is_answered_and_other_discovery_is_discarded() -> Result<()> {
    let (mut rig, world) = rig(Family::V6)?;
    for (source, option) in [(world.pod, true), (world.pod, false), ("fe80::7".parse()?, true)] {
        let run = rig.run(HookId::FromPod, &solicitation(source, GATEWAY_V6, option)?.build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "neighbour_answered"));
        // checks the checksum, too
        let answer = run.packet();
        assert_eq!((answer.src, answer.dst, answer.hop_limit), (GATEWAY_V6.into(), source, 255));
        assert_eq!((answer.eth_dst, answer.eth_src), (run.frame[..6].try_into()?, HOST_MAC));
        assert_eq!(run.frame[54], 136);
        assert_eq!(answer.payload[..16], GATEWAY_V6.octets());
        assert_eq!(answer.payload[16..], [&[2, 1][..], &HOST_MAC].concat());
    }
    let other = solicitation(world.pod, "fd00:10::3".parse()?, true)?;
    let duplicate_detection = solicitation("::".parse()?, GATEWAY_V6, false)?;
    let message = |kind: u8| Frame { icmp: (kind, 0), ..Frame::ping(world.pod, world.host, 0) };
    let ignored = [other, duplicate_detection, message(133), message(136), message(131), message(143)];
    for frame in ignored {
        let run = rig.run(HookId::FromPod, &frame.build())?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "neighbour_ignored"), "{:?}", frame.icmp);
    }
    Ok(())
}

#[test]
fn pod_configures_nobody() -> Result<()> {
    let (mut rig, v4) = rig(Family::V4)?;
    let v6 = World::new(Family::V6);
    let broadcast = "255.255.255.255".parse()?;
    let dhcp = |src: IpAddr, dst: IpAddr, ports: (u16, u16)| Frame::udp(at(src, ports.0), at(dst, ports.1));
    for frame in [
        Frame { icmp: (5, 0), ..Frame::ping(v4.pod, v4.host, 0) },
        Frame { icmp: (9, 0), ..Frame::ping(v4.pod, v4.other_pod, 0) },
        Frame { icmp: (134, 0), ..Frame::ping("fe80::7".parse()?, "ff02::1".parse()?, 0) },
        Frame { icmp: (137, 0), ..Frame::ping("fe80::1".parse()?, v6.host, 0) },
        dhcp(v4.pod, v4.host, (67, 68)),
        dhcp(v4.pod, broadcast, (67, 68)),
        dhcp(v6.pod, v6.host, (547, 546)),
    ] {
        let run = rig.run(HookId::FromPod, &frame.build())?;
        assert_eq!((run.action, run.outcome), (Action::Drop, "configures_others"), "{frame:?}");
    }
    Ok(())
}
