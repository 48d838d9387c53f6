//! Gives a packet the tuple its flow says, opening a flow where the packet may.
//!
//! A function of its own to the verifier, for each kind of new flow: it reads the packet anew, so that nothing but the
//! context enters it and nothing but an answer leaves.

use aya_ebpf::programs::TcContext;
use dataplane_common::reason::{DropReason, Verdict};

use super::{
    Answer, flow, icmp_error,
    parse::{self, Packet},
    rewrite,
    route::{self, Destination},
};
use crate::{family::IpFamily, maps::Work, packet::Frame};

/// What a packet that belongs to no flow may open.
pub(crate) trait NewFlow {
    /// Flows that begin where such a flow is opened ([`flow::kinds`]): only there are their forward packets translated. A pod's packet
    /// to the outside passes two such places, and its flow belongs to one of them.
    const KINDS: u32;

    /// Opens the flow of packets `work.from`, of which this is one, leaving in `work.to` what they leave with: whether there is one
    /// to open.
    fn open<F: IpFamily>(ctx: &impl Frame, work: &mut Work) -> Result<bool, DropReason>;
}

/// Nothing: only packets of known flows are translated.
pub(crate) enum Known {}

impl NewFlow for Known {
    const KINDS: u32 = flow::kinds::ANY;

    #[inline(always)]
    fn open<F: IpFamily>(_ctx: &impl Frame, _work: &mut Work) -> Result<bool, DropReason> {
        Ok(false)
    }
}

/// Translates the packet: whether it was. Then `work.to` is its tuple.
#[inline(always)]
pub(crate) fn packet<F: IpFamily, N: NewFlow>(ctx: &TcContext, work: &mut Work) -> Result<bool, DropReason> {
    #[inline(never)]
    fn outlined<F: IpFamily, N: NewFlow>(ctx: &TcContext, work: &mut Work) -> Answer {
        run::<F, N>(ctx, work).into()
    }
    outlined::<F, N>(ctx, work).get()
}

/// What the host's stack sends to `destination`, if it is the answer of a process that somebody there reached through a
/// service, bears the service's name again.
#[inline(always)]
pub(crate) fn answer<F: IpFamily>(
    ctx: &TcContext,
    sent: &Packet<F>,
    destination: &Destination,
    work: &mut Work,
) -> Result<Verdict, DropReason> {
    let restored = destination.expects(ctx, sent) && packet::<F, Known>(ctx, work)?;
    Ok(if restored { Verdict::Restored } else { Verdict::Delivered })
}

#[inline(always)]
fn run<F: IpFamily, N: NewFlow>(ctx: &TcContext, work: &mut Work) -> Result<bool, DropReason> {
    let packet = F::parse(ctx)?;
    work.is_ours = 0;
    if packet.is_icmp_error(ctx) {
        return icmp_error::translate::<F, N>(ctx, &packet, work);
    }
    if !tuple::<F, N>(ctx, &packet, work)? {
        return Ok(false);
    }
    // while the packet is as its sender knows it
    if route::is_too_big::<F>(ctx, work)? {
        return Err(DropReason::TooBig);
    }
    if work.direct == 0 {
        rewrite::tuple(ctx, &packet, work)?;
    }
    Ok(true)
}

/// Finds the tuple the packet, which is no message about another, is to have: whether it has a flow. Then it is in `work.to`.
#[inline(always)]
pub(crate) fn tuple<F: IpFamily, N: NewFlow>(
    ctx: &impl Frame,
    packet: &Packet<F>,
    work: &mut Work,
) -> Result<bool, DropReason> {
    parse::tuple(ctx, packet, work)?;
    Ok(flow::lookup(work, N::KINDS) || N::open::<F>(ctx, work)?)
}
