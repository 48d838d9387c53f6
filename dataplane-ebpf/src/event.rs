//! Reports of packets. The cold end: the packet is read once more, as far as it can be.

use dataplane_common::{
    abi::{Event, FlowKey},
    net::EtherType,
    reason::Hook,
};

use crate::{
    family::{IpFamily, V4, V6},
    maps::{self, Work},
    packet::Frame,
    skb,
    stages::parse,
};

/// Writes an event. If nobody reads and the ring is full, the event is lost, the counter is not.
#[inline(always)]
pub(crate) fn report(ctx: &impl Frame, work: &mut Work, hook: Hook, outcome: u8) {
    match ctx.ether_type() {
        EtherType::IPV4 => tuple::<V4>(ctx, work),
        EtherType::IPV6 => tuple::<V6>(ctx, work),
        _ => work.from = FlowKey::default(),
    }
    work.event.timestamp = skb::now_ns();
    work.event.tuple = work.from;
    work.event.ifindex = ctx.ifindex();
    work.event.length = ctx.length();
    work.event.hook = hook as u8;
    work.event.outcome = outcome;
    // by reference: a copy of it would not fit on the verifier's stack
    let event: &Event = &work.event;
    let _lost_if_full = maps::events().output(event, 0);
}

/// Leaves the packet's tuple in `work.from`.
#[inline(always)]
fn tuple<F: IpFamily>(ctx: &impl Frame, work: &mut Work) {
    match F::parse(ctx) {
        Ok(packet) => {
            work.from = packet.tuple_without_ports();
            // cut short: without ports
            if packet.has_transport() {
                let _cut_short = parse::transport::<F>(ctx, packet.l4, work);
            }
        }
        Err(_unreadable) => work.from = FlowKey::default(),
    }
}
