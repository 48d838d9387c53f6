//! A packet leaves a pod: tc ingress of the pod's host-side device.
//!
//! Most packets go to another pod without translation: one lookup finds an address of this node,
//! two an address of another, and the packet is redirected past the host's stack. A flow is looked
//! up only for a packet that may be addressed to a frontend, or whose destination's row says that
//! replies to translated connections go there (`FlowHints`).

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, HookId, Verdict};

use super::driver::Hook;
use crate::{
    frame::family::IpFamily,
    scratch::Scratch,
    stages::{
        nat, on_miss,
        route::{self, DeliverVia, Destination, Origin},
    },
};

pub(crate) struct FromPod;

impl Hook for FromPod {
    type Context = TcContext;

    const ID: HookId = HookId::FromPod;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        let destination = route::lookup(&packet.dst)?;
        scratch.frontend_query = destination.frontend_query(Origin::Node);
        let may_have_flow = match destination {
            Destination::Outside { .. } => {
                if let Some(verdict) = packet.link_scoped(ctx) {
                    return Ok(verdict);
                }
                true
            }
            Destination::ServiceRange => true,
            _ => destination.may_have_flow(ctx, &packet),
        };
        let translated = may_have_flow
            && match destination {
                // the only addresses that frontends have
                Destination::Outside { .. } | Destination::ServiceRange | Destination::Host(_) => {
                    nat::translate::<F, on_miss::SelectBackend>(ctx, scratch)?
                }
                _ => nat::translate::<F, on_miss::Pass>(ctx, scratch)?,
            };
        if translated {
            let destination = route::lookup(&scratch.nat_tuple.dst)?;
            return route::forward_translated(ctx, &packet, &destination, scratch);
        }
        route::forward(ctx, &packet, &destination, DeliverVia::Peer)
    }
}
