//! Records of the ring buffer `EVENTS`. Drops and traced packets only, so the packet is simply
//! parsed once more.

use dataplane_common::{
    abi::{Event, FlowKey},
    reason::HookId,
};

use crate::{
    frame::{Frame, family::IpFamily},
    helpers::time,
    maps,
    scratch::Scratch,
    stages::parse,
};

/// Writes the packet's length and tuple, as far as it can be parsed, to `scratch.event`. Overwrites
/// `scratch.tuple`.
#[inline(always)]
pub(crate) fn record_tuple<F: IpFamily>(ctx: &impl Frame, scratch: &mut Scratch) {
    match F::parse(ctx) {
        Ok(packet) => {
            scratch.tuple = packet.tuple_without_ports();
            if packet.has_transport() {
                // a truncated transport header leaves the ports 0
                let _truncated = parse::transport::<F>(ctx, packet.l4, scratch);
            }
        }
        Err(_unparsable) => scratch.tuple = FlowKey::default(),
    }
    copy_to_event(ctx, scratch);
}

/// As [`record_tuple`], for a packet that is not IP.
#[inline(always)]
pub(crate) fn record_without_tuple(ctx: &impl Frame, scratch: &mut Scratch) {
    scratch.tuple = FlowKey::default();
    copy_to_event(ctx, scratch);
}

#[inline(always)]
fn copy_to_event(ctx: &impl Frame, scratch: &mut Scratch) {
    scratch.event.tuple = scratch.tuple;
    scratch.event.length = ctx.length();
}

/// Sends `scratch.event`. With the ring full the event is lost; the counter is not.
#[inline(always)]
pub(crate) fn send(ctx: &impl Frame, scratch: &mut Scratch, hook: HookId, outcome: u8) {
    scratch.event.timestamp = time::now_ns();
    scratch.event.ifindex = ctx.ifindex();
    scratch.event.hook = hook as u8;
    scratch.event.outcome = outcome;
    // by reference: a copy of it would not fit on the BPF stack
    let event: &Event = &scratch.event;
    let _lost_if_full = maps::events().output(event, 0);
}
