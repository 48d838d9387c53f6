//! The host's stack sends a packet to a pod: tc egress of the pod's host-side device.
//!
//! The kernel has routed it; what is left is the answer of a host process that a pod reached through a service.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    skb,
    stages::{route, translate},
    verdict::Place,
};

pub(crate) struct ToPod;

impl Place for ToPod {
    type Context = TcContext;

    const HOOK: Hook = Hook::ToPod;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        if skb::is_decided(ctx) {
            return Ok(Verdict::Forwarded);
        }
        let packet = F::parse(ctx)?;
        if let Some(verdict) = packet.link_scoped(ctx) {
            return Ok(verdict);
        }
        translate::answer(ctx, &packet, &route::find(&packet.dst)?, work)
    }
}
