//! Services translated per packet, in packet order: each program's output is the next one's input.

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
fn a_request_gets_a_backend_and_the_reply_is_restored() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let backend = at(world.wire_pod, 8080);
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.service, SYN).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_wire"));
        assert_eq!(
            run.packet().tuple(),
            (client, backend),
            "the backend in place of the service, the source kept"
        );

        let run = rig.run(HookId::FromWire, &Frame::tcp(backend, client, SYN_ACK).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
        assert_eq!(run.packet().tuple(), (world.service, client));

        let flows = rig.flows()?;
        assert_eq!(flows.len(), 1);
        assert_eq!(flows[0].flags, FlowFlags::SERVICE);
        assert!(rig.gate_open(world.pod, Protocol::TCP)?);
        assert!(!rig.gate_open(world.pod, Protocol::UDP)?, "other protocols stay on the short path");
    }
    Ok(())
}

#[test]
fn udp_with_and_without_checksum() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 5_353), at(world.wire_pod, 8080));
        // a checksum of zero is forbidden over IPv6 (RFC 8200 §8.1)
        for no_checksum in [false, family == Family::V4] {
            let request = Frame { no_checksum, ..Frame::udp(client, world.service) };
            let run = rig.run(HookId::FromPod, &request.build())?;
            assert_eq!(run.packet().tuple(), (client, backend));
            if no_checksum {
                assert_eq!(run.frame[14 + 20 + 6..14 + 20 + 8], [0, 0], "no checksum stays none");
            }
            let run =
                rig.run(HookId::FromWire, &Frame { no_checksum, ..Frame::udp(backend, client) }.build())?;
            assert_eq!(run.packet().tuple(), (world.service, client));
        }
        assert_eq!(rig.flows()?.len(), 1, "the second request found the flow of the first");
    }
    Ok(())
}

/// Only UDP has a checksum that is none: TCP's 0 is a sum, of one packet in 65,536.
#[test]
fn a_tcp_checksum_of_zero_is_mended_like_any() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let checksum = 14 + if family == Family::V4 { 20 } else { 40 } + 16;
        let frame = (0..=u16::MAX)
            .map(|word| {
                Frame { payload: word.to_be_bytes().into(), ..Frame::tcp(client, world.service, SYN) }.build()
            })
            .find(|frame| frame[checksum..checksum + 2] == [0, 0])
            .expect("one of all words makes the sum zero");
        let run = rig.run(HookId::FromPod, &frame)?;
        assert_eq!(run.packet().tuple(), (client, backend));
        assert_ne!(run.frame[checksum..checksum + 2], [0, 0]);
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_service() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.pod, 40_000);
        let run = rig.run(HookId::FromPod, &Frame::tcp(client, world.own_service, SYN).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
        let (src, dst) = run.packet().tuple();
        assert_eq!(dst, at(world.pod, 8080));
        assert_eq!(src.ip(), world.host, "a stack refuses packets from its own address");
        assert!((61_000..=61_999).contains(&src.port()), "a port that is nobody else's: {src}");

        let run = rig.run(HookId::FromPod, &Frame::tcp(dst, src, SYN_ACK).build())?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "to_pod"));
        assert_eq!(run.packet().tuple(), (world.own_service, client));
    }
    Ok(())
}

#[test]
fn a_port_of_the_node_leads_to_a_pod_and_the_reply_comes_from_the_node() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (frontend, server) = (at(world.host, 8088), at(world.pod, 8080));
        rig.service(frontend, Protocol::TCP, 200, &[server], ServiceFlags::HOST_PORT)?;
        // as it is before there are frontends: the host's own business
        let knock = Frame::tcp(at(world.outside, 40_000), frontend, SYN).build();
        assert_eq!(rig.run(HookId::FromWire, &knock)?.outcome, "stack_host");
        // the reply of a pod to another pod looks for no flow before there is one
        let stray = Frame::tcp(server, at(world.wire_pod, 40_000), SYN_ACK).build();
        assert_eq!(rig.run(HookId::FromPod, &stray)?.packet().tuple().0, server);

        rig.host_with_frontends(world.host)?;
        for (hook, client, way_back) in [
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
            assert_eq!((run.action, run.outcome), way_back, "{client}");
            assert_eq!(run.packet().tuple(), (frontend, client));
        }
        // a port nobody asked for stays the host's
        let ssh = Frame::tcp(at(world.outside, 40_000), at(world.host, 22), SYN).build();
        assert_eq!(rig.run(HookId::FromWire, &ssh)?.outcome, "stack_host");
    }
    Ok(())
}

#[test]
fn who_asks_a_service_without_backends_is_refused_at_once() -> Result<()> {
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
            let (message, asked) = (run.packet(), Parsed::read(&request).unwrap());
            assert_eq!((message.src, message.dst), (asked.dst, asked.src), "in the name of the service");
            assert_eq!((message.eth_src, message.eth_dst), (asked.eth_dst, asked.eth_src));
            let header = if family == Family::V4 { 20 } else { 40 };
            let (kind, code) = (run.frame[14 + header], run.frame[14 + header + 1]);
            assert_eq!((kind, code), if family == Family::V4 { (3, 3) } else { (1, 4) }, "port unreachable");
            assert_eq!(message.payload, request[14..14 + header + quoted], "about this very packet");
            let event = rig.last_event()?.context("a dropped packet is reported")?;
            let FlowKey { src, src_port, dst, dst_port, .. } = event.tuple;
            let told = (at(src.to_ip(), src_port.get()), at(dst.to_ip(), dst_port.get()));
            assert_eq!(told, asked.tuple(), "as it came, not as the message it has become");
            assert_eq!(event.length as usize, request.len());
        }
        // so is who asks at another port, as soon as it is known whose the address is
        let stranger = Frame::udp(client, at(world.service.ip(), 9)).build();
        assert_eq!(rig.run(HookId::FromPod, &stranger)?.outcome, "stack_outside");
        rig.cluster_ip(world.service.ip())?;
        let run = rig.run(HookId::FromPod, &stranger)?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "no_port"));
        assert_eq!(run.packet().src, world.service.ip());
        // nobody answers a reset, or a message
        let reset = Frame::tcp(client, world.empty_service, 0x04).build();
        assert_eq!(rig.run(HookId::FromPod, &reset)?.action, Action::Drop);
        assert!(rig.flows()?.is_empty());
    }
    Ok(())
}

/// A client of another node hears it through the tunnel; one that is behind none does not come by it, and hears nothing.
#[test]
fn a_refusal_goes_back_through_the_tunnel() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let client = at(world.overlay_pod, 40_000);
        let request = Frame::tcp(client, world.empty_service, SYN).build();
        let run = rig.run(HookId::FromOverlay, &request)?;
        assert_eq!((run.action, run.outcome), (Action::Redirect, "no_backend"));
        let message = run.packet();
        assert_eq!((message.src, message.dst), (world.empty_service.ip(), world.overlay_pod));
        assert_eq!((message.eth_dst, message.eth_src), (OVERLAY_MAC, HOST_MAC), "into the overlay device");
        for stranger in [world.wire_pod, world.outside] {
            let request = Frame::tcp(at(stranger, 40_000), world.empty_service, SYN).build();
            let run = rig.run(HookId::FromOverlay, &request)?;
            assert_eq!((run.action, run.outcome), (Action::Drop, "no_backend"), "{stranger}");
        }
    }
    Ok(())
}

#[test]
fn the_reply_of_a_host_process_is_restored_on_its_way_to_the_pod() -> Result<()> {
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
fn a_host_process_reaches_a_service_by_the_wire() -> Result<()> {
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

/// As one is that was another's by the time it was copied.
#[test]
fn a_row_whose_seal_is_not_its_own_leads_nowhere() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let [whole, mixed, of_another] = [91, 92, 93].map(|port| at(world.service.ip(), port));
        for frontend in [whole, mixed, of_another] {
            rig.service(frontend, Protocol::UDP, 40, &[backend], 0)?;
        }
        let mut row = rig.service_row(whole, Protocol::UDP)?;
        rig.put_service_row(of_another, Protocol::UDP, row)?;
        row.first_slot += 1;
        rig.put_service_row(mixed, Protocol::UDP, row)?;
        for (frontend, action, outcome) in [
            (whole, Action::Redirect, "to_wire"),
            (mixed, Action::Drop, "bad_service"),
            (of_another, Action::Drop, "bad_service"),
        ] {
            let run = rig.run(HookId::FromPod, &Frame::udp(client, frontend).build())?;
            assert_eq!((run.action, run.outcome), (action, outcome), "{frontend}");
        }
    }
    Ok(())
}

#[test]
fn selection_by_hash_is_the_tuples_and_at_random_is_not() -> Result<()> {
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
        assert_eq!(first, again, "the same tuple chooses the same backend");
        chosen.insert(first);
    }
    assert!(chosen.len() > 4, "tuples spread: {chosen:?}");
    Ok(())
}

#[test]
fn services_are_no_business_of_other_protocols() -> Result<()> {
    let (mut rig, world) = rig(Family::V4)?;
    let run = rig.run(HookId::FromPod, &Frame::ping(world.pod, world.service.ip(), 1).build())?;
    assert_eq!(run.outcome, "stack_outside");
    Ok(())
}
