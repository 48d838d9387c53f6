//! A packet arrives from another node through the tunnel: tc ingress of the overlay device.
//!
//! As from the wire, but a packet for another machine is dropped.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, HookId, Verdict};

use super::{
    driver::Hook,
    from_wire::{Inbound, resolve_inbound},
};
use crate::{
    frame::family::IpFamily,
    scratch::Scratch,
    stages::route::{self, DeliverVia},
};

pub(crate) struct FromOverlay;

impl Hook for FromOverlay {
    type Context = TcContext;

    const ID: HookId = HookId::FromOverlay;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        match resolve_inbound(ctx, &packet, scratch)? {
            Inbound::Local(destination) => route::forward(ctx, &packet, &destination, DeliverVia::Peer),
            Inbound::Translated(destination) => {
                route::forward_translated(ctx, &packet, &destination, scratch)
            }
            // the sending node's routes are out of date
            Inbound::NotLocal => Err(DropReason::NoEndpoint),
        }
    }
}
