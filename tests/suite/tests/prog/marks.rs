//! The mark of handled packets: its own bits are set and tested, all others belong to other
//! programs.

use anyhow::Result;
use dataplane_common::{abi::NodeConfig, reason::HookId};
use dataplane_testkit::prog::{Family, Frame, MARK, Metadata, Rig, at, per_packet_udp, rig, rig_with};

/// Bits of kubelet, Calico and Tailscale.
const OTHERS: u32 = 0x00ff_c000;

/// Runs a program on a frame with this mark; returns the outcome and the mark afterwards.
fn run_marked(rig: &mut Rig, hook: HookId, frame: &[u8], mark: u32) -> Result<(&'static str, u32)> {
    let metadata = Metadata { mark, ..rig.metadata(hook, frame)? };
    let run = rig.run_with(hook, frame, metadata)?;
    Ok((run.outcome, run.mark))
}

#[test]
fn other_bits_of_the_mark_are_kept() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frame = Frame::udp(at(world.pod, 40_000), at(world.wire_pod, 443)).build();
        for others in [0, OTHERS, !MARK] {
            assert_eq!(run_marked(&mut rig, HookId::FromPod, &frame, others)?, ("to_wire", others | MARK));
        }
    }
    Ok(())
}

#[test]
fn only_a_packet_with_all_bits_of_the_mark_counts_as_handled() -> Result<()> {
    let mask = 0x30_0000;
    let (mut rig, world) = rig_with(Family::V4, &NodeConfig { mark: mask, ..per_packet_udp() })?;
    let frame = Frame::udp(at(world.pod, 40_000), at(world.outside, 443)).build();
    for mark in [mask, mask | OTHERS, u32::MAX] {
        assert_eq!(run_marked(&mut rig, HookId::ToWire, &frame, mark)?, ("forwarded", mark));
    }
    for mark in [0, OTHERS & !mask, 0x10_0000, 0x20_0000, !mask] {
        assert_eq!(run_marked(&mut rig, HookId::ToWire, &frame, mark)?, ("masqueraded", mark));
    }
    Ok(())
}
