//! The mark of handled packets: its own bits are set and tested, all others belong to other
//! programs.

use anyhow::Result;
use dataplane_common::{abi::NodeConfig, reason::HookId};
use dataplane_testkit::prog::{Family, Frame, MARK, at, per_packet_udp, rig, rig_with};

/// Bits of kubelet, Calico and Tailscale.
const OTHERS: u32 = 0x00ff_c000;

#[test]
fn other_bits_of_the_mark_are_kept() -> Result<()> {
    for family in Family::BOTH {
        let (mut rig, world) = rig(family)?;
        let frame = Frame::udp(at(world.pod, 40_000), at(world.wire_pod, 443)).build();
        for others in [0, OTHERS, !MARK] {
            let (outcome, mark) = rig.run_marked(HookId::FromPod, &frame, others)?;
            assert_eq!((outcome, mark), ("to_wire", others | MARK));
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
        assert_eq!(rig.run_marked(HookId::ToWire, &frame, mark)?, ("forwarded", mark));
    }
    for mark in [0, OTHERS & !mask, 0x10_0000, 0x20_0000, !mask] {
        assert_eq!(rig.run_marked(HookId::ToWire, &frame, mark)?, ("masqueraded", mark));
    }
    Ok(())
}
