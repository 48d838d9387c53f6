//! A packet leaves a pod: tc ingress of the pod's host-side device.
//!
//! Most packets go to another pod and need no translation: one lookup finds the address on this node, two on another,
//! and the packet is on its way past the host's stack. Only what is addressed to a service, or may be the answer to
//! something that was translated, looks for a flow: the destination says so.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    stages::{
        route::{self, Destination, From, Into},
        service::ToBackend,
        translate::{self, Known},
    },
    verdict::Place,
};

pub(crate) struct FromPod;

impl Place for FromPod {
    type Context = TcContext;

    const HOOK: Hook = Hook::FromPod;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        let destination = route::find(&packet.dst)?;
        work.asks = destination.asked(From::Here);
        let looks = match destination {
            Destination::Outside { .. } => {
                if let Some(verdict) = packet.link_scoped(ctx) {
                    return Ok(verdict);
                }
                true
            }
            Destination::Services => true,
            _ => destination.expects(ctx, &packet),
        };
        let translated = looks
            && match destination {
                // where frontends are
                Destination::Outside { .. } | Destination::Services | Destination::Host(_) => {
                    translate::packet::<F, ToBackend>(ctx, work)?
                }
                _ => translate::packet::<F, Known>(ctx, work)?,
            };
        if translated {
            let destination = route::find(&work.to.dst)?;
            return route::forward_translated(ctx, &packet, &destination, work);
        }
        route::forward(ctx, &packet, &destination, Into::Peer)
    }
}
