//! Packets in parts: all of them go where the first goes, and together they are a packet whose checksum is right.

use anyhow::Result;
use dataplane_common::reason::HookId;
use proptest::{prelude::*, sample::select};

use super::{
    dropped, fail, packets,
    stage::Stage,
    try_all,
    wire::{self, Read, SCTP, TCP, UDP},
};

#[test]
fn parts_of_a_packet_are_translated_as_one() -> Result<()> {
    let stage = Stage::new()?;
    let translated = std::cell::Cell::new(0);
    let packet = packets::packet().prop_filter("has ports", |packet| {
        [TCP, UDP, SCTP].contains(&packet.protocol)
            && packet.hop_limit > 1
            && packet.hook != HookId::FromOverlay
    });
    let strategy = (packet, select(vec![3_usize, 4, 5, 8]), any::<bool>());
    try_all(3, &strategy, |(packet, units, backwards)| {
        let parts = packet.parts(units);
        let asked = Read::frame(&parts[0]).map_err(fail)?;
        let mut order: Vec<usize> = (1..parts.len()).collect();
        if backwards {
            order.reverse();
        }
        let first = stage.run(packet.hook, &parts[0]).map_err(fail)?;
        if dropped(first.outcome) {
            return stage.pass_time().map_err(fail);
        }
        let sent = Read::frame(&first.frame).map_err(fail)?;
        if (sent.src, sent.dst) == (asked.src, asked.dst) {
            return stage.pass_time().map_err(fail);
        }
        let mut whole: Vec<(usize, Vec<u8>)> = vec![(0, first.frame[sent.l4..sent.end].to_vec())];
        for number in order {
            let run = stage.run(packet.hook, &parts[number]).map_err(fail)?;
            let part = Read::frame(&run.frame).map_err(|wrong| fail((wrong, number)))?;
            prop_assert_eq!(run.outcome, first.outcome, "part {} goes where the first goes", number);
            prop_assert_eq!(
                (part.src.ip(), part.dst.ip()),
                (sent.src.ip(), sent.dst.ip()),
                "part {}",
                number
            );
            let before = Read::frame(&parts[number]).map_err(fail)?;
            let changed = wire::differences(&parts[number], &run.frame, &before.changeable());
            prop_assert!(changed.is_empty(), "part {number}: bytes at {changed:?} have changed");
            whole.push((part.fragment.0, run.frame[part.l4..part.end].to_vec()));
        }
        whole.sort();
        let transport: Vec<u8> = whole.into_iter().flat_map(|(_, bytes)| bytes).collect();
        sent.check_transport(&transport).map_err(fail)?;
        translated.set(translated.get() + 1);
        stage.pass_time().map_err(fail)
    });
    assert!(translated.get() > 10, "{} packets were translated in parts", translated.get());
    stage.check_flows()
}
