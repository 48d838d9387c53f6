//! Fragmented packets: all fragments go where the first goes, and the reassembled packet has a
//! valid checksum.

use anyhow::Result;
use dataplane_common::reason::HookId;
use proptest::{prelude::*, sample::select};

use super::{
    check_all,
    decode::{self, Decoded, SCTP, TCP, UDP},
    dropped, fail,
    node::TestNode,
    packets,
};

#[test]
fn fragments_of_a_packet_get_the_same_translation() -> Result<()> {
    let node = TestNode::new()?;
    let translated = std::cell::Cell::new(0);
    let packet = packets::packet().prop_filter("has ports", |packet| {
        [TCP, UDP, SCTP].contains(&packet.protocol)
            && packet.hop_limit > 1
            && packet.hook != HookId::FromOverlay
    });
    let strategy = (packet, select(vec![3_usize, 4, 5, 8]), any::<bool>());
    check_all(3, &strategy, |(packet, units, backwards)| {
        let fragments = packet.fragments(units);
        let original = Decoded::frame(&fragments[0]).map_err(fail)?;
        let mut order: Vec<usize> = (1..fragments.len()).collect();
        if backwards {
            order.reverse();
        }
        let first = node.run(packet.hook, &fragments[0]).map_err(fail)?;
        if dropped(first.outcome) {
            return node.pass_time().map_err(fail);
        }
        let sent = Decoded::frame(&first.frame).map_err(fail)?;
        if (sent.src, sent.dst) == (original.src, original.dst) {
            return node.pass_time().map_err(fail);
        }
        let mut whole: Vec<(usize, Vec<u8>)> = vec![(0, first.frame[sent.l4..sent.end].to_vec())];
        for number in order {
            let run = node.run(packet.hook, &fragments[number]).map_err(fail)?;
            let fragment = Decoded::frame(&run.frame).map_err(|wrong| fail((wrong, number)))?;
            prop_assert_eq!(run.outcome, first.outcome, "fragment {} must go where the first goes", number);
            prop_assert_eq!(
                (fragment.src.ip(), fragment.dst.ip()),
                (sent.src.ip(), sent.dst.ip()),
                "fragment {}",
                number
            );
            let before = Decoded::frame(&fragments[number]).map_err(fail)?;
            let changed = decode::differences(&fragments[number], &run.frame, &before.changeable());
            prop_assert!(changed.is_empty(), "fragment {number}: bytes at {changed:?} changed");
            whole.push((fragment.fragment.0, run.frame[fragment.l4..fragment.end].to_vec()));
        }
        whole.sort();
        let transport: Vec<u8> = whole.into_iter().flat_map(|(_, bytes)| bytes).collect();
        sent.check_transport(&transport).map_err(fail)?;
        translated.set(translated.get() + 1);
        node.pass_time().map_err(fail)
    });
    assert!(translated.get() > 10, "{} fragmented packets were translated", translated.get());
    node.check_flows()
}
