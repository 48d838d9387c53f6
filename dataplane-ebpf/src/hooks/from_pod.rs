//! A packet leaves a pod: tc ingress of the pod's host-side device.
//!
//! Most packets go to another pod and need no translation: one lookup finds the address on this node, two on another,
//! and the packet is on its way past the host's stack. Only what is addressed to a service, or may be the answer to
//! something that was translated, looks for a flow.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use crate::{
    family::IpFamily,
    maps::Work,
    stages::{
        flow, icmp_error,
        route::{self, Destination, Into},
        service,
    },
    verdict::Place,
};

pub(crate) struct FromPod;

impl Place for FromPod {
    const HOOK: Hook = Hook::FromPod;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        let mut packet = F::parse(ctx)?;
        let mut destination = route::find(&packet.dst)?;
        let translated = if packet.protocol == F::ICMP {
            if let Some(verdict) = packet.link_scoped(ctx) {
                return Ok(verdict);
            }
            if packet.is_icmp_error(ctx) {
                icmp_error::translate(ctx, &mut packet, work)?
            } else {
                destination.gate_open(packet.protocol) && flow::translate(ctx, &mut packet, work)?
            }
        } else if matches!(destination, Destination::Outside { .. }) {
            if let Some(verdict) = packet.link_scoped(ctx) {
                return Ok(verdict);
            }
            service::translate(ctx, &mut packet, work)?
        } else {
            destination.gate_open(packet.protocol) && flow::translate(ctx, &mut packet, work)?
        };
        if translated {
            destination = route::find(&packet.dst)?;
        }
        route::forward(ctx, &packet, &destination, Into::Peer)
    }
}
