//! Packets with `CHECKSUM_COMPLETE`: the kernel compares its checksum with the output packet
//! (`BPF_F_TEST_SKB_CHECKSUM_COMPLETE`, Linux 6.16).

use anyhow::Result;
use dataplane_common::reason::HookId;
use dataplane_testkit::prog::{Family, Frame, Rig, at, rig};

/// Runs the packet, which must go on to the pod; returns whether this kernel can check.
fn run(rig: &mut Rig, hook: HookId, frame: &Frame) -> Result<bool> {
    let outcome = rig.run_checksum_complete(hook, &frame.build())?;
    match outcome {
        Some(outcome) => assert!(matches!(outcome, "to_pod" | "stack_pod"), "{outcome}: {frame:?}"),
        None => println!("skipped: this kernel does not check CHECKSUM_COMPLETE in test runs"),
    }
    Ok(outcome.is_some())
}

#[test]
fn checksum_complete_matches_the_translated_packet() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let (client, backend) = (at(world.pod, 40_000), at(world.wire_pod, 8080));
        let outside = at(world.outside, 443);
        rig.run(HookId::FromPod, &Frame::tcp(client, world.service, 2).build())?;
        rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?;
        let between = rig.run(HookId::ToWire, &Frame::udp(client, outside).build())?.packet().tuple().0;
        let pinged =
            rig.run(HookId::ToWire, &Frame::ping(world.pod, world.outside, 7).build())?.packet().src_port;
        let sent = rig.run(HookId::FromPod, &Frame::udp(client, world.service).build())?.frame;
        let fragment = |fragment| Frame {
            fragment: Some(fragment),
            payload: vec![3; 16],
            ..Frame::udp(backend, client)
        };
        let arriving = [
            // not translated: only the hop limit changes
            Frame::udp(outside, client),
            Frame::tcp(backend, client, 0x12),
            Frame::udp(backend, client),
            Frame::udp(outside, between),
            Frame::pong(world.outside, world.host, pinged),
            Frame::too_big(world.outside, world.pod, &sent),
            fragment((0, true)),
            fragment((3, false)),
        ];
        for frame in &arriving {
            if !run(&mut rig, HookId::FromWire, frame)? {
                return Ok(());
            }
        }
    }
    Ok(())
}
