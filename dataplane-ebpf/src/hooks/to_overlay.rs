//! The host's stack sends a packet to another node's pod through the tunnel: tc egress of the overlay device.
//!
//! The kernel's route names the device; which node the packet goes to is ours to say, and that an answer is a service's.
//! Packets of pods come with their tunnel end already set.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    skb,
    stages::{
        route::{self, Destination},
        translate,
    },
    verdict::Place,
};

pub(crate) struct ToOverlay;

impl Place for ToOverlay {
    type Context = TcContext;

    const HOOK: Hook = Hook::ToOverlay;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        if skb::is_decided(ctx) {
            return Ok(Verdict::Forwarded);
        }
        let packet = F::parse(ctx)?;
        // the kernel's own, about the device itself: the tunnel has no use for it, and drops it
        if let Some(verdict) = packet.link_scoped(ctx) {
            return Ok(verdict);
        }
        let destination = route::find(&packet.dst)?;
        let Destination::Node(route) = destination else {
            return Err(DropReason::NoEndpoint);
        };
        let verdict = translate::answer(ctx, &packet, &destination, work)?;
        route::enter_tunnel(ctx, route)?;
        skb::mark_decided(ctx);
        Ok(verdict)
    }
}
