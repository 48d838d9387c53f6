//! ICMP errors in every direction of translation: path MTU discovery works through services and
//! masquerade.

use anyhow::Result;
use dataplane_common::{net::Protocol, reason::HookId};
use dataplane_testkit::prog::{Family, Frame, Run, at, rig};

/// Offset of the packet that an ICMP error quotes: after Ethernet, IP and ICMP header.
fn carried(family: Family) -> usize {
    if family == Family::V4 { 14 + 20 + 8 } else { 14 + 40 + 8 }
}

/// Source, destination and ports of the quoted packet, as bytes.
fn inside(run: &Run, family: Family) -> (Vec<u8>, Vec<u8>, [u8; 4]) {
    let at = carried(family);
    let (src, dst, ports) = if family == Family::V4 { (12, 16, 20) } else { (8, 24, 40) };
    let width = dst - src;
    let bytes = &run.frame[at..];
    let ports: [u8; 4] = bytes[ports..ports + 4].try_into().unwrap();
    (bytes[src..src + width].to_vec(), bytes[dst..dst + width].to_vec(), ports)
}

fn octets(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ports(src: u16, dst: u16) -> [u8; 4] {
    [src.to_be_bytes(), dst.to_be_bytes()].concat().try_into().unwrap()
}

#[test]
fn too_big_about_a_translated_request_quotes_the_service() -> Result<()> {
    for family in Family::BOTH {
        for protocol in [Protocol::TCP, Protocol::UDP] {
            let (mut rig, world) = rig(family)?;
            let client = at(world.pod, 40_000);
            let request = Frame { protocol, ..Frame::tcp(client, world.service, 0x02) };
            let sent = rig.run(HookId::FromPod, &request.build())?.frame;
            let run =
                rig.run(HookId::FromWire, &Frame::too_big(world.wire_node, world.pod, &sent).build())?;
            assert_eq!(run.outcome, "to_pod");
            let outer = run.packet();
            assert_eq!((outer.src, outer.dst), (world.wire_node, world.pod), "the router's address is kept");
            assert_eq!(
                inside(&run, family),
                (octets(world.pod), octets(world.service.ip()), ports(40_000, 80)),
                "the packet that the application sent"
            );
        }
    }
    Ok(())
}

#[test]
fn too_big_about_a_masqueraded_packet_reaches_the_pod() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (pod, outside) = (at(world.pod, 40_000), at(world.outside, 443));
        let sent = rig.run(HookId::ToWire, &Frame::tcp(pod, outside, 0x02).build())?.frame;
        let router = world.exempt;
        let run = rig.run(HookId::FromWire, &Frame::too_big(router, world.host, &sent).build())?;
        assert_eq!(run.outcome, "stack_pod", "the way of the pod's packet");
        assert_eq!((run.packet().src, run.packet().dst), (router, world.pod));
        assert_eq!(inside(&run, family), (octets(world.pod), octets(world.outside), ports(40_000, 443)));
    }
    Ok(())
}

#[test]
fn error_of_the_backend_has_the_service_as_source() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let sent = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?.frame;
        let unreachable = Frame {
            icmp: if family == Family::V4 { (3, 3) } else { (1, 4) },
            ..Frame::too_big(world.wire_pod, world.pod, &sent)
        };
        let run = rig.run(HookId::FromWire, &unreachable.build())?;
        assert_eq!(run.packet().src, world.service.ip());
        assert_eq!(inside(&run, family).1, octets(world.service.ip()));
    }
    Ok(())
}

#[test]
fn error_of_a_pod_about_a_reply_reaches_the_backend() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        let got = rig.run(HookId::FromWire, &Frame::udp(backend, client).build())?.frame;
        let run = rig.run(HookId::FromPod, &Frame::too_big(world.pod, world.service.ip(), &got).build())?;
        assert_eq!(run.outcome, "to_wire");
        assert_eq!((run.packet().src, run.packet().dst), (world.pod, world.wire_pod));
        assert_eq!(inside(&run, family), (octets(world.wire_pod), octets(world.pod), ports(8080, 40_000)));
    }
    Ok(())
}

#[test]
fn errors_about_untranslated_packets_pass_unchanged() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let sent = Frame::udp(at(world.pod, 1), at(world.wire_pod, 2)).build();
        let run = rig.run(HookId::FromWire, &Frame::too_big(world.wire_node, world.pod, &sent).build())?;
        assert_eq!(run.outcome, "to_pod");
        assert_eq!(inside(&run, family), (octets(world.pod), octets(world.wire_pod), ports(1, 2)));
    }
    Ok(())
}
