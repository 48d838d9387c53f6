//! Translation of services per packet, in packet order: the output of each program is the input of
//! the next.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use dataplane_common::{
    abi::{FlowFlags, FlowKey, ServiceFlags},
    net::Protocol,
    reason::HookId,
};
use dataplane_testkit::prog::{Action, Family, Frame, HOST_MAC, OVERLAY_MAC, Parsed, at, rig};

const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;

#[test]
fn reply_is_translated_back_to_cluster_ip() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let backend = at(world.wire_pod, 8080);
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_wire"));
        assert_eq!(
            run.packet().tuple(),
            (client, backend),
            "destination replaced by the backend, source kept"
        );

        let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
        assert_eq!(run.packet().tuple(), (world.service, client));

        let flows = rig.flows()?;
        assert_eq!(flows.len(), 1);
        assert_eq!(flows[0].flags, FlowFlags::SERVICE);
        assert!(rig.may_have_flow(world.pod, Protocol::TCP)?);
        assert!(!rig.may_have_flow(world.pod, Protocol::UDP)?, "no flow lookup for other protocols");
    }
    Ok(())
}

#[test]
fn udp_is_translated_with_and_without_checksum() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 5_353), at(world.wire_pod, 8080));
        // a checksum of zero is forbidden over IPv6 (RFC 8200 §8.1)
        for no_checksum in [false, family == Family::V4] {
            let request = Frame { no_checksum, ..Frame::udp(client, world.service) };
            let run = rig.run(HookId::FromPod, &request.build())?;
            assert_eq!(run.packet().tuple(), (client, backend));
            if no_checksum {
                assert_eq!(run.frame[14 + 20 + 6..14 + 20 + 8], [0, 0], "a missing checksum stays zero");
            }
            let run =
                rig.run(HookId::FromWire, &Frame { no_checksum, ..Frame::udp(backend, client) }.build())?;
            assert_eq!(run.packet().tuple(), (world.service, client));
        }
        assert_eq!(rig.flows()?.len(), 1, "the second request uses the flow of the first");
    }
    Ok(())
}

/// Only in UDP does 0 mean no checksum; in TCP it is a valid checksum, of one packet in 65,536.
#[test]
fn tcp_checksum_of_zero_is_updated() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let checksum = 14 + if family == Family::V4 { 20 } else { 40 } + 16;
        let frame = (0..=u16::MAX)
            .map(|word| {
                Frame { payload: word.to_be_bytes().into(), ..Frame::tcp(client, world.service, SYN) }.build()
            })
            .find(|frame| frame[checksum..checksum + 2] == [0, 0])
            .expect("one of all words makes the checksum zero");
        let run = rig.run(HookId::FromPod, &frame)?;
        assert_eq!(run.packet().tuple(), (client, backend));
        assert_ne!(run.frame[checksum..checksum + 2], [0, 0]);
    }
    Ok(())
}

#[test]
fn hairpin_through_a_service_is_translated() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.own_service, SYN).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
        let (src, dst) = run.packet().tuple();
        assert_eq!(dst, at(world.pod, 8080));
        assert_eq!(src.ip(), world.host, "the pod's stack drops packets from its own address");
        assert!((61_000..=61_999).contains(&src.port()), "an SNAT port: {src}");

        let run = rig.run(HookId::FromPod, &Frame::tcp(dst, src, SYN_ACK).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
        assert_eq!(run.packet().tuple(), (world.own_service, client));
    }
    Ok(())
}

#[test]
fn host_port_is_translated_to_the_pod_and_back() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (frontend, server) = (at(world.host, 8088), at(world.pod, 8080));
        rig.service(frontend, Protocol::TCP, 200, &[server], ServiceFlags::HOST_PORT)?;
        // without the flag for frontends packets to the host go to the stack
        let request = Frame::tcp(at(world.outside, 40_000), frontend, SYN).build();
        assert_eq!(rig.run(HookId::FromWire, &request)?.outcome, "stack_host");
        // without a flow the pod's packet is not translated
        let stray = Frame::tcp(server, at(world.wire_pod, 40_000), SYN_ACK).build();
        assert_eq!(rig.run(HookId::FromPod, &stray)?.packet().tuple().0, server);

        rig.host_with_frontends(world.host)?;
        for (hook, client, reply) in [
            (HookId::FromWire, world.outside, (Action::Next, "stack_outside")),
            (HookId::FromWire, world.wire_pod, (Action::Redirect, "to_wire")),
            (HookId::FromWire, world.wire_node, (Action::Redirect, "to_wire")),
            (HookId::FromOverlay, world.overlay_pod, (Action::Redirect, "to_overlay")),
            (HookId::FromPod, world.other_pod, (Action::Redirect, "to_pod")),
        ] {
            let client = at(client, 40_000);
            let run = rig.run(hook, &Frame::tcp(client, frontend, SYN).build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"), "{client}");
            assert_eq!(run.packet().tuple(), (client, server), "the client's address is kept");
            let run = rig.run(HookId::FromPod, &Frame::tcp(server, client, SYN_ACK).build())?;
            assert_eq!((run.action, run.outcome), reply, "{client}");
            assert_eq!(run.packet().tuple(), (frontend, client));
        }
        // other ports of the host go to the stack
        let ssh = Frame::tcp(at(world.outside, 40_000), at(world.host, 22), SYN).build();
        assert_eq!(rig.run(HookId::FromWire, &ssh)?.outcome, "stack_host");
    }
    Ok(())
}

#[test]
fn request_to_a_service_without_backends_gets_port_unreachable() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        for (request, quoted) in [
            (Frame::tcp(client, world.empty_service, SYN), 20),
            (Frame { no_checksum: false, ..Frame::udp(client, world.empty_service) }, 8),
        ] {
            let request = request.build();
            let run = rig.run(HookId::FromPod, &request)?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, "no_backend"));
            let (message, sent) = (run.packet(), Parsed::read(&request).unwrap());
            assert_eq!((message.src, message.dst), (sent.dst, sent.src), "with the service as source");
            assert_eq!((message.eth_src, message.eth_dst), (sent.eth_dst, sent.eth_src));
            let header = if family == Family::V4 { 20 } else { 40 };
            let (kind, code) = (run.frame[14 + header], run.frame[14 + header + 1]);
            assert_eq!((kind, code), if family == Family::V4 { (3, 3) } else { (1, 4) }, "port unreachable");
            assert_eq!(message.payload, request[14..14 + header + quoted], "quotes the packet");
            let event = rig.last_event()?.context("a dropped packet is reported")?;
            let FlowKey { src, src_port, dst, dst_port, .. } = event.tuple;
            let reported = (at(src.to_ip(), src_port.get()), at(dst.to_ip(), dst_port.get()));
            assert_eq!(reported, sent.tuple(), "the packet received, not the ICMP error sent");
            assert_eq!(event.length as usize, request.len());
        }
        // requests to other ports get it too, once the address is known as a cluster IP
        let other_port = Frame::udp(client, at(world.service.ip(), 9)).build();
        assert_eq!(rig.run(HookId::FromPod, &other_port)?.outcome, "stack_outside");
        rig.cluster_ip(world.service.ip())?;
        let run = rig.run(HookId::FromPod, &other_port)?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "no_port"));
        assert_eq!(run.packet().src, world.service.ip());
        // a TCP reset is never answered
        let reset = Frame::tcp(client, world.empty_service, 0x04).build();
        assert_eq!(rig.run(HookId::FromPod, &reset)?.action, Action::Drop);
        assert!(rig.flows()?.is_empty());
    }
    Ok(())
}

/// A client on a node behind the tunnel gets the ICMP error through the tunnel.
#[test]
fn icmp_error_is_sent_back_through_the_tunnel() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.overlay_pod, 40_000);
        let request = Frame::tcp(client, world.empty_service, SYN).build();
        let run = rig.run(HookId::FromOverlay, &request)?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "no_backend"));
        let message = run.packet();
        assert_eq!((message.src, message.dst), (world.empty_service.ip(), world.overlay_pod));
        assert_eq!((message.eth_dst, message.eth_src), (OVERLAY_MAC, HOST_MAC), "into the overlay device");
    }
    Ok(())
}

#[test]
fn reply_of_a_host_process_to_a_pod_is_translated_back() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, api) = (at(world.pod, 40_000), at(world.host, 6443));
        rig.service(at(world.service.ip(), 443), Protocol::TCP, 200, &[api], 0)?;
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, at(world.service.ip(), 443), SYN).build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
        assert_eq!(run.packet().tuple(), (client, api));
        let run = rig.run(HookId::ToPod, &Frame::tcp(api, client, SYN_ACK).build())?;
        assert_eq!((run.action, run.outcome), (Action::Next, "restored"));
        assert_eq!(run.packet().tuple(), (at(world.service.ip(), 443), client));
    }
    Ok(())
}

#[test]
fn request_of_a_host_process_is_translated_at_the_uplink() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.host, 40_000);
        for (service, backend, outcome) in [
            (world.service, at(world.wire_pod, 8080), "to_wire"),
            (world.own_service, at(world.pod, 8080), "to_pod"),
        ] {
            let run = rig.run(HookId::ToWire, &Frame::udp(client, service).build())?;
            assert_eq!((run.action, run.outcome), (Action::Redirect, outcome));
            assert_eq!(run.packet().tuple(), (client, backend));
            let hook = if outcome == "to_pod" { HookId::FromPod } else { HookId::FromWire };
            let run = rig.run(hook, &Frame::udp(backend, client).build())?;
            assert_eq!((run.action, run.outcome), (Action::Next, "stack_host"));
            assert_eq!(run.packet().tuple(), (service, client));
        }
    }
    Ok(())
}

/// As for a row that was reused for another frontend while it was read.
#[test]
fn row_with_a_wrong_checksum_is_dropped_as_bad_service() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let [intact, mixed, other_key] = [91, 92, 93].map(|port| at(world.service.ip(), port));
        for frontend in [intact, mixed, other_key] {
            rig.service(frontend, Protocol::UDP, 40, &[backend], 0)?;
        }
        let mut row = rig.service_row(intact, Protocol::UDP)?;
        rig.put_service_row(other_key, Protocol::UDP, row)?;
        row.first_slot += 1;
        rig.put_service_row(mixed, Protocol::UDP, row)?;
        for (frontend, action, outcome) in [
            (intact, Action::Redirect, "to_wire"),
            (mixed, Action::Drop, "bad_service"),
            (other_key, Action::Drop, "bad_service"),
        ] {
            let run = rig.run(HookId::FromPod, &Frame::udp(client, frontend).build())?;
            assert_eq!((run.action, run.outcome), (action, outcome), "{frontend}");
        }
    }
    Ok(())
}

#[test]
fn selection_by_hash_depends_on_the_tuple_only() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let backends: Vec<_> = (1..=8).map(|host| at(format!("10.1.1.{host}").parse().unwrap(), 8080)).collect();
    let hashed = at(world.service.ip(), 90);
    rig.service(hashed, Protocol::UDP, 40, &backends, ServiceFlags::HASH)?;
    let mut chosen = HashSet::new();
    for port in 1..=24 {
        let first = rig.run(HookId::FromPod, &Frame::udp(at(world.pod, port), hashed).build())?.packet().dst;
        rig.raise_generation(backends.iter().position(|b| b.ip() == first).unwrap() as u32 + 40)?;
        rig.service(hashed, Protocol::UDP, 40, &backends, ServiceFlags::HASH)?;
        let again = rig.run(HookId::FromPod, &Frame::udp(at(world.pod, port), hashed).build())?.packet().dst;
        assert_eq!(first, again, "the same tuple gets the same backend");
        chosen.insert(first);
    }
    assert!(chosen.len() > 4, "tuples are spread over backends: {chosen:?}");
    Ok(())
}

#[test]
fn other_protocols_to_a_cluster_ip_are_not_translated() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let run = rig.run(HookId::FromPod, &Frame::ping(world.pod, world.service.ip(), 1).build())?;
    assert_eq!(run.outcome, "stack_outside");
    Ok(())
}
