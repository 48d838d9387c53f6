//! A packet arrives from another node through the tunnel: tc ingress of the overlay device.
//!
//! As from the wire, but only what is for this node has any business here.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Hook, Verdict};

use super::from_wire::{Arrived, arrive};
use crate::{
    family::IpFamily,
    maps::Work,
    stages::route::{self, Into},
    verdict::Place,
};

pub(crate) struct FromOverlay;

impl Place for FromOverlay {
    type Context = TcContext;

    const HOOK: Hook = Hook::FromOverlay;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &TcContext, work: &mut Work) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        match arrive(ctx, &packet, work)? {
            Arrived::Here(destination) => route::forward(ctx, &packet, &destination, Into::Peer),
            Arrived::Translated(destination) => route::forward_translated(ctx, &packet, &destination, work),
            // nobody tunnels to us what is not here: the sender's idea of the cluster is old
            Arrived::Elsewhere => Err(DropReason::NoEndpoint),
        }
    }
}
