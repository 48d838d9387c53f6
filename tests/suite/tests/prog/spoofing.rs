//! Sources that a sender does not own: every sender with every source, in packets of every kind.
//! Each cell asserts the verdict, and the rig the one counter.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{
    Action, Family, Frame, Metadata, OVERLAY_VNI, POD_MAC, Rig, World, at, devices, rig,
};

const SYN: u8 = 0x02;

/// Where a source address belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The first pod of this node.
    Pod,
    /// The second.
    OtherPod,
    /// This node's pod CIDR, but no pod has it.
    Unassigned,
    /// A pod of a node reached natively, and of one reached through the tunnel.
    WirePod,
    OverlayPod,
    Host,
    WireNode,
    OverlayNode,
    Service,
    Internet,
    Loopback,
    /// An IPv4-mapped IPv6 address of the pod.
    Mapped,
    LinkLocal,
    Unspecified,
    Multicast,
}

impl Owner {
    const ALL: [Self; 15] = [
        Self::Pod,
        Self::OtherPod,
        Self::Unassigned,
        Self::WirePod,
        Self::OverlayPod,
        Self::Host,
        Self::WireNode,
        Self::OverlayNode,
        Self::Service,
        Self::Internet,
        Self::Loopback,
        Self::Mapped,
        Self::LinkLocal,
        Self::Unspecified,
        Self::Multicast,
    ];

    /// An address of it; `None` if the family has none.
    fn address(self, family: Family, world: &World) -> Option<IpAddr> {
        let ip = |v4: &str, v6: &str| -> Option<IpAddr> {
            match family {
                Family::V4 => v4.parse().ok(),
                Family::V6 => v6.parse().ok(),
            }
        };
        match self {
            Self::Pod => Some(world.pod),
            Self::OtherPod => Some(world.other_pod),
            Self::Unassigned => Some(world.unassigned),
            Self::WirePod => Some(world.wire_pod),
            Self::OverlayPod => Some(world.overlay_pod),
            Self::Host => Some(world.host),
            Self::WireNode => Some(world.wire_node),
            Self::OverlayNode => ip("172.19.0.4", ""),
            Self::Service => Some(world.service.ip()),
            Self::Internet => Some(world.outside),
            Self::Loopback => ip("127.0.0.1", "::1"),
            Self::Mapped => ip("", "::ffff:10.1.0.2"),
            Self::LinkLocal => ip("169.254.7.7", "fe80::7"),
            Self::Unspecified => ip("0.0.0.0", "::"),
            Self::Multicast => ip("224.0.0.7", "ff02::7"),
        }
    }
}

/// Why a packet of this sender with a source of this owner is dropped; `None`: it is not, or not
/// for its source.
fn expected(hook: HookId, owner: Owner, family: Family) -> Option<&'static str> {
    use Owner::{Host, Loopback, Mapped, OtherPod, OverlayNode, OverlayPod, Pod, WireNode, WirePod};
    match (hook, owner) {
        (_, Mapped) => Some("mapped_address"),
        // the first pod
        (HookId::FromPod, Pod) => None,
        (HookId::FromPod, _) => Some("source_not_owned"),
        (_, Loopback) => Some("loopback_address"),
        (_, Pod | OtherPod | Host) => Some("source_is_local"),
        // on the wire nothing else is known of a source; through the tunnel the sender's own pass
        (HookId::FromWire, _) | (_, OverlayPod | OverlayNode) => None,
        // the row of an IPv6 address names the node by IPv6, and the tunnel by IPv4: only that a
        // node sent it is known
        (_, WirePod | WireNode) if family == Family::V6 => None,
        _ => Some("tunnel_source"),
    }
}

/// A packet of each kind.
fn frames(src: IpAddr, dst: IpAddr) -> Vec<(&'static str, Vec<u8>)> {
    let (src, dst) = (at(src, 40_000), at(dst, 8_080));
    let udp = Frame::udp(src, dst);
    let extension = match src {
        SocketAddr::V4(_) => Frame { extra: vec![1; 4], ..udp.clone() },
        SocketAddr::V6(_) => Frame {
            extra: vec![Protocol::UDP, 0, 1, 4, 0, 0, 0, 0],
            first_extension: Some(Protocol::DESTINATION),
            ..udp.clone()
        },
    };
    vec![
        ("TCP", Frame::tcp(src, dst, SYN).build()),
        ("UDP", udp.build()),
        ("SCTP", Frame::sctp(src, dst, 1).build()),
        ("echo request", Frame::ping(src.ip(), dst.ip(), 7).build()),
        ("echo reply", Frame::pong(src.ip(), dst.ip(), 7).build()),
        ("first fragment", Frame { fragment: Some((0, true)), ..udp.clone() }.build()),
        ("later fragment", Frame { fragment: Some((3, false)), ..udp }.build()),
        ("options", extension.build()),
    ]
}

#[test]
fn packet_with_a_source_of_somebody_else_is_dropped() -> Result<()> {
    let source_reasons =
        ["source_not_owned", "source_is_local", "loopback_address", "mapped_address", "tunnel_source"];
    let mut cells = 0;
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for hook in [HookId::FromPod, HookId::FromWire, HookId::FromOverlay] {
            for owner in Owner::ALL {
                let Some(source) = owner.address(family, &world) else { continue };
                for destination in [world.other_pod, world.host, world.service.ip(), world.outside] {
                    for (kind, frame) in frames(source, destination) {
                        let mut metadata = rig.metadata(hook, &frame)?;
                        if hook == HookId::FromPod {
                            metadata.ifindex = devices::PODS[0];
                        }
                        let run = rig.run_with(hook, &frame, metadata)?;
                        let cell = format!("{} {owner:?} {source} -> {destination} {kind}", hook.name());
                        cells += 1;
                        match expected(hook, owner, family) {
                            // an address of no node or pod may be behind the tunnel only with DSR
                            Some("tunnel_source")
                                if destination != world.other_pod && destination != world.host =>
                            {
                                assert_eq!(run.action, Action::Drop, "{cell}: {}", run.outcome);
                            }
                            Some(reason) => {
                                assert_eq!((run.action, run.outcome), (Action::Drop, reason), "{cell}");
                            }
                            None => {
                                assert!(!source_reasons.contains(&run.outcome), "{cell}: {}", run.outcome);
                            }
                        }
                    }
                }
            }
        }
    }
    println!("{cells} cells");
    Ok(())
}

/// What `from_pod` does with a packet of the pod behind `ifindex`.
fn outcome_from(rig: &mut Rig, ifindex: u32, frame: &[u8]) -> Result<&'static str> {
    let metadata = Metadata { ifindex, ..rig.metadata(HookId::FromPod, frame)? };
    Ok(rig.run_with(HookId::FromPod, frame, metadata)?.outcome)
}

#[test]
fn pod_sends_from_its_allowed_sources_only() -> Result<()> {
    for (family, prefix, bits, inside, beside) in [
        (Family::V4, "10.9.0.0", 16, "10.9.7.7", "10.10.7.7"),
        (Family::V6, "fd00:9::", 64, "fd00:9::7", "fd00:9:0:1::7"),
    ] {
        let (mut rig, world) = rig(family)?;
        let [router, other] = [devices::PODS[0], devices::PODS[1]];
        rig.allow_source(router, (prefix.parse()?, bits))?;
        for (device, source, is_allowed) in
            [(router, inside, true), (router, beside, false), (other, inside, false)]
        {
            for (kind, frame) in frames(source.parse()?, world.other_pod) {
                let outcome = outcome_from(&mut rig, device, &frame)?;
                assert_eq!(outcome != "source_not_owned", is_allowed, "{device} {source} {kind}: {outcome}");
                assert!(!is_allowed || kind != "UDP" || outcome == "to_pod", "{outcome}");
            }
        }
    }
    Ok(())
}

/// A pod that may send as everybody cannot send as this node, as another pod of it, or from an
/// address that no machine has.
#[test]
fn allowed_sources_never_cover_addresses_of_this_node() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let unspecified = Owner::Unspecified.address(family, &world).context("unspecified address")?;
        // also by a row that the agent would not write: of the whole range of IPv4-mapped addresses
        rig.allow_source(devices::PODS[0], (unspecified, 0))?;
        for owner in Owner::ALL {
            let Some(source) = owner.address(family, &world) else { continue };
            let refused = match owner {
                Owner::Mapped => Some("mapped_address"),
                Owner::OtherPod
                | Owner::Host
                | Owner::Loopback
                | Owner::LinkLocal
                | Owner::Unspecified
                | Owner::Multicast => Some("source_not_owned"),
                _ => None,
            };
            for (kind, frame) in frames(source, world.other_pod) {
                let outcome = outcome_from(&mut rig, devices::PODS[0], &frame)?;
                match refused {
                    Some(reason) => assert_eq!(outcome, reason, "{owner:?} {source} {kind}"),
                    None => assert_ne!(outcome, "source_not_owned", "{owner:?} {source} {kind}"),
                }
            }
        }
    }
    Ok(())
}

#[test]
fn xdp_drops_a_local_source_before_it_is_translated() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for (source, outcome) in [(world.pod, "source_is_local"), (world.host, "source_is_local")] {
            let run = rig.run(HookId::XdpWire, &Frame::tcp(at(source, 1), world.service, SYN).build())?;
            assert_eq!((run.action, run.outcome), (Action::Drop, outcome));
        }
    }
    Ok(())
}

/// The tunnel's sender must be the node that the inner source belongs to, in this VNI.
#[test]
fn tunnel_is_between_nodes_only() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frame = Frame::udp(at(world.overlay_pod, 1), at(world.pod, 2)).build();
        let node = Ipv4Addr::new(172, 19, 0, 4);
        let stranger = Ipv4Addr::new(192, 0, 2, 9);
        for (tunnel, outcome) in [
            ((OVERLAY_VNI, node), "to_pod"),
            ((OVERLAY_VNI + 1, node), "tunnel_source"),
            ((OVERLAY_VNI, stranger), "tunnel_source"),
            ((OVERLAY_VNI, Ipv4Addr::new(10, 1, 2, 5)), "tunnel_source"),
        ] {
            let metadata = Metadata { tunnel, ..rig.metadata(HookId::FromOverlay, &frame)? };
            let run = rig.run_with(HookId::FromOverlay, &frame, metadata)?;
            assert_eq!(run.outcome, outcome, "{tunnel:?}");
        }
        // a router on the path of the other node's client reports to a pod
        let sent = Frame::udp(at(world.pod, 2), at(world.overlay_pod, 1)).build();
        let error = Frame::too_big(world.outside, world.pod, &sent).build();
        assert_eq!(rig.run(HookId::FromOverlay, &error)?.outcome, "to_pod");
    }
    Ok(())
}

#[test]
fn pod_does_not_reach_the_tunnel_port_of_a_node() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for node in [world.host, world.wire_node] {
            let run = rig.run(HookId::FromPod, &Frame::udp(at(world.pod, 1), at(node, 8_472)).build())?;
            assert_eq!((run.action, run.outcome), (Action::Drop, "tunnel_port"), "{node}");
        }
        // another address of a node, which no row names
        let masqueraded = Frame::udp(at(world.pod, 1), at(world.outside, 8_472)).build();
        assert_eq!(rig.run(HookId::ToWire, &masqueraded)?.outcome, "tunnel_port");
        // a pod may use the port
        let run =
            rig.run(HookId::FromPod, &Frame::udp(at(world.pod, 1), at(world.other_pod, 8_472)).build())?;
        assert_eq!(run.outcome, "to_pod");
    }
    Ok(())
}

#[test]
fn frame_with_a_vlan_tag_is_dropped_or_left_alone() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for tag in [[0x81, 0x00], [0x88, 0xa8]] {
            for (hook, source, action, outcome) in [
                (HookId::FromPod, world.pod, Action::Drop, "vlan_tag"),
                (HookId::FromOverlay, world.overlay_pod, Action::Drop, "vlan_tag"),
                (HookId::FromWire, world.outside, Action::Next, "stack_vlan"),
                (HookId::XdpWire, world.outside, Action::Next, "stack_not_ip"),
            ] {
                let mut frame = Frame::tcp(at(source, 1), world.service, SYN).build();
                frame.splice(12..12, [tag[0], tag[1], 0, 7]);
                let run = rig.run(hook, &frame)?;
                assert_eq!((run.action, run.outcome, run.frame), (action, outcome, frame), "{}", hook.name());
            }
        }
    }
    Ok(())
}

/// Behind a switch that floods, every node sees every frame.
#[test]
fn frame_for_another_station_is_left_to_the_kernel() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        for (station, outcome) in
            [([2, 0, 0, 0, 0, 0x99], "stack_other_host"), ([0xff; 6], "stack_link_local")]
        {
            let mut frame = Frame::tcp(at(world.outside, 1), world.own_service, SYN).build();
            frame[..6].copy_from_slice(&station);
            let run = rig.run(HookId::FromWire, &frame)?;
            assert_eq!((run.action, run.outcome, run.frame), (Action::Next, outcome, frame));
        }
        assert_eq!(rig.flows()?, []);
    }
    Ok(())
}

/// A pod is no router: it may report errors about its own flows only. And an error is for the end
/// of the flow that sent the quoted packet.
#[test]
fn icmp_error_reaches_only_the_owner_of_the_flow() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let victim = at(world.other_pod, 40_000);
        let sent = rig.run(HookId::ToWire, &Frame::udp(victim, at(world.outside, 53)).build())?;
        assert_eq!(sent.outcome, "masqueraded");
        let forged = Frame::too_big(world.pod, world.host, &sent.frame).build();
        let run = rig.run(HookId::FromPod, &forged)?;
        assert_eq!((run.outcome, run.frame), ("stack_host", forged), "of a pod, about another's flow");
        let misaddressed = Frame::too_big(world.outside, world.pod, &sent.frame).build();
        let run = rig.run(HookId::FromWire, &misaddressed)?;
        assert_eq!(run.packet().dst, world.pod, "to its own destination, not to the flow's owner");
        let real = Frame::too_big(world.exempt, world.host, &sent.frame).build();
        assert_eq!(rig.run(HookId::FromWire, &real)?.packet().dst, world.other_pod);
    }
    Ok(())
}

#[test]
fn echo_request_never_matches_a_masqueraded_identifier() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let sent = rig.run(HookId::ToWire, &Frame::ping(world.pod, world.outside, 7).build())?.packet();
        let request = Frame::ping(world.outside, world.host, sent.src_port).build();
        let run = rig.run(HookId::FromWire, &request)?;
        assert_eq!((run.outcome, run.frame), ("stack_host", request));
        let reply = Frame::pong(world.outside, world.host, sent.src_port).build();
        assert_eq!(rig.run(HookId::FromWire, &reply)?.outcome, "stack_pod");
    }
    Ok(())
}

/// Two devices may share a slot of `POD_SOURCES`: then the row in `ENDPOINTS` decides for one.
#[test]
fn pod_without_a_slot_of_its_own_sends_from_its_address_only() -> Result<()> {
    let [device, _] = devices::PODS;
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        rig.remove_endpoint(world.pod)?;
        rig.pod_without_slot(world.pod, device, POD_MAC)?;
        for (source, expected) in [(world.pod, "to_wire"), (world.other_pod, "source_not_owned")] {
            let frame = Frame::udp(at(source, 1_000), at(world.wire_pod, 80)).build();
            assert_eq!(outcome_from(&mut rig, device, &frame)?, expected);
        }
    }
    Ok(())
}
