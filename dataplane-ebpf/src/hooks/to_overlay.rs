//! The host's stack sends a packet to another node's pod through the tunnel: tc egress of the
//! overlay device.
//!
//! The kernel's route names only the device. This hook sets the tunnel's remote end, and translates
//! replies of host processes back to their frontend. Packets of pods arrive here with their tunnel
//! key set.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, HookId, Verdict};

use super::driver::Hook;
use crate::{
    frame::family::IpFamily,
    helpers::skb,
    scratch::Scratch,
    stages::{
        nat,
        route::{self, Destination, Origin},
    },
};

pub(crate) struct ToOverlay;

impl Hook for ToOverlay {
    type Context = TcContext;

    const ID: HookId = HookId::ToOverlay;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        if skb::is_handled(ctx) {
            return Ok(Verdict::Forwarded);
        }
        let packet = F::parse(ctx)?;
        // the kernel's multicast and neighbour discovery on the device itself: without a tunnel key
        // VXLAN drops it
        if let Some(verdict) = packet.link_scoped(ctx) {
            return Ok(verdict);
        }
        let destination = route::lookup(&packet.dst)?;
        let Destination::Node(route) = destination else {
            return Err(DropReason::NoEndpoint);
        };
        scratch.frontend_query = destination.frontend_query(Origin::Node);
        let verdict = nat::translate_host_reply(ctx, &packet, &destination, scratch)?;
        route::encapsulate(ctx, route)?;
        skb::mark_handled(ctx);
        Ok(verdict)
    }
}
