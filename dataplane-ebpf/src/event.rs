//! Reports of packets. The cold end: the packet is read once more, as far as it can be.

use dataplane_common::{
    abi::{Event, FlowKey},
    reason::Hook,
};

use crate::{
    family::IpFamily,
    maps::{self, Work},
    packet::Frame,
    skb,
    stages::parse,
};

/// Leaves in `work.event` which packet this is, as far as it can be read. Its tuple is in `work.from`, too.
#[inline(always)]
pub(crate) fn describe<F: IpFamily>(ctx: &impl Frame, work: &mut Work) {
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
    keep(ctx, work);
}

/// As [`describe`], of a packet that is none of IP.
#[inline(always)]
pub(crate) fn describe_unknown(ctx: &impl Frame, work: &mut Work) {
    work.from = FlowKey::default();
    keep(ctx, work);
}

#[inline(always)]
fn keep(ctx: &impl Frame, work: &mut Work) {
    work.event.tuple = work.from;
    work.event.length = ctx.length();
}

/// Writes an event about the packet that was described. If nobody reads and the ring is full, the event is lost, the counter is
/// not.
#[inline(always)]
pub(crate) fn report(ctx: &impl Frame, work: &mut Work, hook: Hook, outcome: u8) {
    work.event.timestamp = skb::now_ns();
    work.event.ifindex = ctx.ifindex();
    work.event.hook = hook as u8;
    work.event.outcome = outcome;
    // by reference: a copy of it would not fit on the verifier's stack
    let event: &Event = &work.event;
    let _lost_if_full = maps::events().output(event, 0);
}
