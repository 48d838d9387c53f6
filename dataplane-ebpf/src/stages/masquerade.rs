//! Pods that talk to the outside do so as their node.

use aya_ebpf::programs::TcContext;
use dataplane_common::{abi::NodeFlags, reason::DropReason};

use super::{
    Answer, flow,
    parse::{self, Packet},
    rewrite,
};
use crate::{
    config,
    family::IpFamily,
    maps::{Purpose, Work},
};

/// Gives a packet of a pod the node's address as its source: whether it did.
#[inline(always)]
pub(crate) fn source<F: IpFamily>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    work: &mut Work,
) -> Result<bool, DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily>(ctx: &TcContext, packet: &mut Packet<F>, work: &mut Work) -> Answer {
        try_source(ctx, packet, work).into()
    }
    outlined(ctx, packet, work).get()
}

#[inline(always)]
fn try_source<F: IpFamily>(
    ctx: &TcContext,
    packet: &mut Packet<F>,
    work: &mut Work,
) -> Result<bool, DropReason> {
    let node = F::node_address();
    if !config::flag(NodeFlags::MASQUERADE) || node.is_unspecified() {
        return Ok(false);
    }
    parse::tuple(ctx, packet, work)?;
    if !flow::lookup(work, packet.tcp_flags(ctx)) {
        work.reply = work.from.reversed();
        work.purpose =
            Purpose { source: node, service_id: 0, backend_id: 0, backend_generation: 0, flags: 0 };
        flow::create(work)?;
    }
    rewrite::tuple(ctx, packet, work)?;
    Ok(true)
}
