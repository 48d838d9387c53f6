//! The programs on a node with services of every kind, and the path of packets and replies through
//! them.

use std::{
    cell::RefCell,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use dataplane_common::{
    abi::{Addr, Port, Scope, ServiceFlags},
    flow::State,
    reason::HookId,
};
use dataplane_testkit::prog::{Action, Family, Rig, Run, World, at, rig, uplink};

use super::{
    decode::{SCTP, TCP, UDP},
    dropped,
    packets::{HOST_PORT, Packet, load_balancer_ips},
};

/// A dual-stack node.
pub(crate) struct TestNode {
    rig: RefCell<Rig>,
}

/// An output packet, and the hook of its reply.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) frame: Vec<u8>,
    pub(crate) reply_hook: HookId,
    /// The outcome at each hook.
    pub(crate) outcomes: Vec<&'static str>,
}

/// The result for a packet.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// Forwarded, or passed to the kernel.
    Forwarded(Output),
    /// Dropped with an ICMP error to the sender.
    Rejected(Vec<u8>),
    /// Dropped without a message.
    Dropped(&'static str),
}

impl TestNode {
    pub(crate) fn new() -> Result<Self> {
        let (mut rig, _) = rig(Family::V4)?;
        for family in Family::BOTH {
            let world = World::new(family);
            let base = if family == Family::V4 { 110 } else { 240 };
            add_services(&mut rig, family, &world, base).context("services")?;
        }
        Ok(Self { rig: RefCell::new(rig) })
    }

    /// A node with an uplink and next hops for XDP, in a namespace of the calling thread.
    pub(crate) fn with_uplink() -> Result<Self> {
        let node = Self::new()?;
        uplink(&Family::BOTH)?;
        node.rig.borrow_mut().device_without_address()?;
        Ok(node)
    }

    /// The translation of a tuple, if it has a flow.
    pub(crate) fn translation(
        &self,
        src: SocketAddr,
        dst: SocketAddr,
        protocol: u8,
    ) -> Option<(SocketAddr, SocketAddr)> {
        let flow = self.rig.borrow_mut().flow_of(src, dst, protocol).ok()?;
        let end = |ip: Addr, port: Port| at(ip.to_ip(), port.get());
        let reply = flow.reply;
        Some((end(reply.dst, reply.dst_port), end(reply.src, reply.src_port)))
    }

    /// Runs a program.
    pub(crate) fn run(&self, hook: HookId, frame: &[u8]) -> Result<Run> {
        self.rig.borrow_mut().run(hook, frame)
    }

    /// Makes every flow evictable, so that there is room for the next.
    pub(crate) fn pass_time(&self) -> Result<()> {
        self.rig.borrow_mut().age_flows(|flow| {
            flow.state = State::Closing as u32;
            flow.last_seen = 0;
        })
    }

    /// Checks that the flow table is consistent.
    pub(crate) fn check_flows(&self) -> Result<()> {
        self.rig.borrow_mut().flows().map(drop)
    }

    /// Runs a packet through all programs of the node that see it.
    pub(crate) fn send(&self, packet: &Packet, frame: &[u8]) -> Result<Outcome> {
        self.follow(packet.hook, frame, packet.src().ip(), packet.family)
    }

    /// As [`Self::send`], from `hook` on. `sender`: the destination of a reply by a host process.
    pub(crate) fn follow(
        &self,
        hook: HookId,
        frame: &[u8],
        sender: IpAddr,
        family: Family,
    ) -> Result<Outcome> {
        let world = World::new(family);
        let run = self.run(hook, frame)?;
        if dropped(run.outcome) {
            return Ok(match run.action {
                Action::Redirect => Outcome::Rejected(run.frame),
                _ => Outcome::Dropped(run.outcome),
            });
        }
        let then = |hook| {
            let mut outcome = self.follow(hook, &run.frame, sender, family)?;
            if let Outcome::Forwarded(output) = &mut outcome {
                output.outcomes.insert(0, run.outcome);
            }
            Ok(outcome)
        };
        let reply_hook = match run.outcome {
            "to_pod" | "restored" => HookId::FromPod,
            "to_overlay" => HookId::FromOverlay,
            "left_to_tc" => {
                ensure!(run.frame == frame, "a packet passed to tc must be unchanged");
                return then(HookId::FromWire);
            }
            _ if hook == HookId::XdpWire => HookId::XdpWire,
            // a host process replies, through the device that leads to the sender
            "stack_host" if [world.pod, world.other_pod].contains(&sender) => HookId::ToPod,
            "stack_host" if sender == world.overlay_pod => HookId::ToOverlay,
            "stack_host" => HookId::ToWire,
            "stack_outside" if hook == HookId::FromPod => return then(HookId::ToWire),
            "stack_pod" => {
                let mut outcome = then(HookId::ToPod)?;
                if let Outcome::Forwarded(output) = &mut outcome {
                    output.reply_hook = HookId::FromPod;
                }
                return Ok(outcome);
            }
            _ => HookId::FromWire,
        };
        Ok(Outcome::Forwarded(Output { frame: run.frame, reply_hook, outcomes: vec![run.outcome] }))
    }
}

/// Adds services to those of `World`: several backends of all kinds, at cluster IPs, node ports and
/// load balancer IPs.
fn add_services(rig: &mut Rig, family: Family, world: &World, base: u32) -> Result<()> {
    let web = |address: IpAddr| at(address, 8080);
    let backends_everywhere =
        [world.pod, world.other_pod, world.wire_pod, world.overlay_pod, world.outside, world.host].map(web);
    let service = world.service.ip();
    rig.host_with_node_ports(world.host)?;
    rig.cluster_ip(service)?;
    for (number, protocol) in [TCP, UDP, SCTP].into_iter().enumerate() {
        let mut first = base + number as u32 * 40;
        let mut add =
            |frontend: SocketAddr, backends: &[SocketAddr], scope: Scope, flags: u32, affinity: u32| {
                let added = rig.service_with(frontend, protocol, first, backends, |key, row| {
                    key.scope = scope as u8;
                    if frontend.port() == 30_080 {
                        *key = key.at_node();
                    }
                    row.flags = flags;
                    row.affinity_timeout = affinity;
                });
                first += backends.len() as u32;
                added
            };
        add(at(service, 83), &backends_everywhere, Scope::Any, 0, 0)?;
        add(at(service, 84), &backends_everywhere, Scope::Any, ServiceFlags::HASH, 0)?;
        add(at(service, 85), &backends_everywhere, Scope::Any, 0, 10)?;
        add(at(world.host, 30_080), &backends_everywhere, Scope::Any, 0, 0)?;
        let [cluster, local, dsr, restricted] = load_balancer_ips(family);
        add(at(cluster, 80), &[web(world.host), web(world.wire_pod)], Scope::Any, 0, 0)?;
        add(at(local, 80), &backends_everywhere[1..3], Scope::Any, ServiceFlags::OUTSIDE, 0)?;
        add(at(local, 80), &backends_everywhere[..1], Scope::Outside, ServiceFlags::LOCAL, 0)?;
        add(at(dsr, 80), &backends_everywhere[..4], Scope::Any, ServiceFlags::HASH | ServiceFlags::DSR, 0)?;
        add(at(world.host, HOST_PORT), &[web(world.pod)], Scope::Any, ServiceFlags::HOST_PORT, 0)?;
        add(at(restricted, 80), &backends_everywhere[1..3], Scope::Any, ServiceFlags::SOURCE_RANGES, 0)?;
        // the service ID is its first slot plus one
        rig.allow_source_range(first - 1, (world.exempt, if family == Family::V4 { 32 } else { 128 }))?;
    }
    Ok(())
}
