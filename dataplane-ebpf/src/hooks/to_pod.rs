//! The host's stack sends a packet to a pod: tc egress of the pod's host-side device.
//!
//! The kernel has routed it already. What is left is the reply of a host process that the pod
//! reached through a service: its source is translated back to the frontend.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, HookId, Verdict};

use super::driver::Hook;
use crate::{
    frame::family::IpFamily,
    helpers::skb,
    scratch::Scratch,
    stages::{
        nat,
        route::{self, Origin},
    },
};

pub(crate) struct ToPod;

impl Hook for ToPod {
    type Context = TcContext;

    const ID: HookId = HookId::ToPod;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, scratch: &mut Scratch) -> Result<Verdict, DropReason> {
        if skb::is_handled(ctx) {
            return Ok(Verdict::Forwarded);
        }
        let packet = F::parse(ctx)?;
        if let Some(verdict) = packet.link_scoped(ctx) {
            return Ok(verdict);
        }
        let destination = route::lookup(&packet.dst)?;
        scratch.frontend_query = destination.frontend_query(Origin::Node);
        nat::translate_host_reply(ctx, &packet, &destination, scratch)
    }
}
