//! A packet arrives from another machine: XDP of an uplink, in its driver.
//!
//! What has come from outside for a service of this node and goes on to another node, and what comes back from there, turns
//! round here, before the kernel has made anything of it. Everything else goes on to [`FromWire`](super::FromWire), which would have done
//! the same: both find and make the same flows, so a connection may change between them at any packet.

use aya_ebpf::programs::XdpContext;
use dataplane_common::{
    net::{EthHeader, Protocol, SctpHeader},
    reason::{DropReason, Hook, Verdict},
};

use crate::{
    family::{IpFamily, L3},
    maps::Work,
    packet::{self, Frame},
    skb::{self, Way},
    stages::{
        parse::{Fragment, Packet},
        rewrite,
        route::{self, Destination, From},
        service::ToBackend,
        translate,
    },
    verdict::Place,
};

pub(crate) struct XdpWire;

impl Place for XdpWire {
    type Context = XdpContext;

    const HOOK: Hook = Hook::XdpWire;

    #[inline(always)]
    fn run<F: IpFamily>(ctx: &XdpContext, work: &mut Work) -> Result<Verdict, DropReason> {
        let packet = F::parse(ctx)?;
        if !is_plain(ctx, &packet) {
            return Ok(Verdict::LeftToTc);
        }
        let destination = route::find(&packet.dst)?;
        work.asks = destination.asked(From::Outside);
        let asks = match destination {
            Destination::Host(endpoint) => endpoint.flow_hints.may_have_flow(packet.protocol),
            Destination::Outside { .. } | Destination::Services => packet.link_scoped(ctx).is_none(),
            _ => false,
        };
        if !asks {
            return Ok(Verdict::LeftToTc);
        }
        match translate::tuple::<F, ToBackend>(ctx, &packet, work) {
            Ok(true) => turn_round(ctx, &packet, work),
            // tc can answer, which takes more than a driver's buffer has room for
            Ok(false) | Err(DropReason::NoBackend | DropReason::NoPort) => Ok(Verdict::LeftToTc),
            Err(reason) => Err(reason),
        }
    }
}

/// Whether it is a whole packet of a protocol with ports, without options: nearly all are.
#[inline(always)]
fn is_plain<F: IpFamily>(ctx: &impl Frame, packet: &Packet<F>) -> bool {
    Protocol::has_ports(packet.protocol)
        && packet.fragment == Fragment::Whole
        && packet.l4 == L3 + F::HEADER
        && packet.hop_limit > 1
        && is_summed(ctx, packet)
}

/// SCTP that has crossed no wire may come with its checksum still to be computed, and out of here nobody would.
#[inline(always)]
fn is_summed<F: IpFamily>(ctx: &impl Frame, packet: &Packet<F>) -> bool {
    packet.protocol != Protocol::SCTP
        || ctx.read::<SctpHeader>(packet.l4).is_ok_and(|header| header.checksum != 0)
}

/// Sends the packet of tuple `work.to` out of the device it came by, if that is its way.
#[inline(always)]
fn turn_round<F: IpFamily>(ctx: &XdpContext, packet: &Packet<F>, work: &Work) -> Result<Verdict, DropReason> {
    let verdict = match route::find(&work.to.dst)? {
        Destination::Node(route) if route.is_native() => Verdict::ToWire,
        Destination::Outside { .. } => Verdict::ToOutside,
        // this node, or a tunnel
        _ => return Ok(Verdict::LeftToTc),
    };
    let length = ctx.length() as u16 - L3 as u16;
    let Way::Neighbour { ifindex, ours, theirs } = skb::way(ctx, &work.to.src, &work.to.dst, length) else {
        return Ok(Verdict::LeftToTc);
    };
    // a device that listens to everything also hears what is for others
    let is_ours = packet::with_header(ctx, 0, |eth: &mut EthHeader| eth.dst == ours)?;
    if ifindex != ctx.ifindex() || !is_ours {
        return Ok(Verdict::LeftToTc);
    }
    if work.direct == 0 {
        rewrite::tuple(ctx, packet, work)?;
    }
    F::decrement_hop_limit(ctx)?;
    route::set_link_addresses(ctx, theirs, ours)?;
    Ok(verdict)
}
