//! Answers pings to the addresses of services, which no device has.
//!
//! An address is answered for while a port of it has a ready backend ([`ServiceFlags::READY`]). The
//! request becomes the reply, and goes back the way it came.

use aya_ebpf::programs::TcContext;
use dataplane_common::{
    abi::{Addr, NodeFlags, ServiceFlags, ServiceKey},
    checksum::Change,
    net::{EthHeader, IcmpHeader},
    reason::{DropReason, HookId, Verdict},
};

use super::reject;
use crate::{
    config,
    frame::{
        ChangedIn, ChecksumField, Frame, L3,
        family::IpFamily,
        packet::{Fragment, Packet},
        with_header,
    },
    global::{PackedResult, global_functions},
    helpers::is_zero,
    maps,
};

/// Answers the packet if it is an echo request to a service address with a ready backend. `Some`
/// ends the run. Fragments, and packets with options or extension headers, are not answered.
#[inline(always)]
pub(crate) fn answer<F: IpFamily>(
    ctx: &TcContext,
    packet: &Packet<F>,
    hook: HookId,
) -> Result<Option<Verdict>, DropReason> {
    // by arithmetic: a branch on the protocol would make the verifier follow all code below twice
    let is_icmp = is_zero(u32::from(packet.protocol ^ F::ICMP));
    if !config::flag(NodeFlags::ANSWER_PING) || is_icmp == 0 {
        return Ok(None);
    }
    let answered = PackedResult::from_raw(call_answer_ping::<F>(ctx));
    // there is only one reason: the verifier would follow every number that might be one
    if !answered.unpack().map_err(|_refused| DropReason::WriteFailed)? {
        return Ok(None);
    }
    let has_way = !matches!(hook, HookId::FromOverlay) || reject::is_sent_into_tunnel::<F>(ctx);
    if has_way && reject::send_back(ctx, hook) {
        Ok(Some(Verdict::EchoAnswered))
    } else {
        Err(DropReason::BadRoute)
    }
}

global_functions! {
    call_answer_ping: answer_ping_v4, answer_ping_v6 = run_without_scratch(try_answer);
}

#[inline(always)]
fn try_answer<F: IpFamily>(ctx: &TcContext) -> Result<bool, DropReason> {
    let packet = F::parse(ctx)?;
    if packet.fragment != Fragment::Whole || packet.l4 != L3 + F::HEADER {
        return Ok(false);
    }
    let Ok(icmp) = ctx.read::<IcmpHeader>(packet.l4) else { return Ok(false) };
    let (request, reply) = F::ECHO;
    if icmp.kind != request || icmp.code != 0 || !is_ready(&packet.dst) {
        return Ok(false);
    }
    // one station: not multicast, broadcast, link-local or loopback
    if packet.src.is_unspecified() || F::is_link_scoped(&packet.src) {
        return Ok(false);
    }
    with_header(ctx, 0, |eth: &mut EthHeader| eth.set_addresses(eth.src, eth.dst))?;
    F::answer_header(ctx)?;
    let (before, after) = (u16::from_ne_bytes([request, 0]), u16::from_ne_bytes([reply, 0]));
    ctx.write_u16(packet.l4, after)?;
    let checksum = ChecksumField::at(packet.l4 + IcmpHeader::CHECKSUM);
    ctx.update_checksum(checksum, Change::NONE.u16(before, after), ChangedIn::Segment)?;
    Ok(true)
}

/// Whether it is the address of a service, of which a port has a ready backend.
#[inline(always)]
fn is_ready(addr: &Addr) -> bool {
    let flags = maps::service_flags(&ServiceKey::of_address(*addr))
        | maps::service_flags(&ServiceKey::of_ping(*addr));
    flags & ServiceFlags::READY != 0
}
