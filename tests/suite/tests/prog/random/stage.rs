//! The programs on a node with services of every kind, and the ways of packets and of their answers through them.

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
    dropped,
    packets::{HOST_PORT, Packet, balancers},
    wire::{SCTP, TCP, UDP},
};

/// A node of both families.
pub(crate) struct Stage {
    rig: RefCell<Rig>,
}

/// A packet that has left, and where its answer is met.
#[derive(Clone, Debug)]
pub(crate) struct Left {
    pub(crate) frame: Vec<u8>,
    pub(crate) answered_at: HookId,
    /// What became of it at each hook.
    pub(crate) outcomes: Vec<&'static str>,
}

/// What became of a packet.
#[derive(Clone, Debug)]
pub(crate) enum Became {
    /// It is on its way, or given to the kernel.
    Passed(Left),
    /// A message to its sender that nobody answers.
    Refused(Vec<u8>),
    /// It ended here.
    Dropped(&'static str),
}

impl Stage {
    pub(crate) fn new() -> Result<Self> {
        let (mut rig, _) = rig(Family::V4)?;
        for family in Family::BOTH {
            let world = World::new(family);
            let base = if family == Family::V4 { 110 } else { 240 };
            furnish(&mut rig, family, &world, base).context("services")?;
        }
        Ok(Self { rig: RefCell::new(rig) })
    }

    /// One whose driver finds ways, in a namespace of the calling thread.
    pub(crate) fn with_driver() -> Result<Self> {
        let stage = Self::new()?;
        uplink(&mut stage.rig.borrow_mut(), &Family::BOTH)?;
        Ok(stage)
    }

    /// What a packet of this tuple is to have, if it has a flow.
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

    /// Runs a program once.
    pub(crate) fn run(&self, hook: HookId, frame: &[u8]) -> Result<Run> {
        self.rig.borrow_mut().run(hook, frame)
    }

    /// Every flow so far is one that is over: there is room for the next.
    pub(crate) fn pass_time(&self) -> Result<()> {
        self.rig.borrow_mut().age_flows(|flow| {
            flow.state = State::Closing as u32;
            flow.last_seen = 0;
        })
    }

    /// Every flow is whole.
    pub(crate) fn check_flows(&self) -> Result<()> {
        self.rig.borrow_mut().flows().map(drop)
    }

    /// Sends a packet through all programs of the node that see it.
    pub(crate) fn send(&self, packet: &Packet, frame: &[u8]) -> Result<Became> {
        self.follow(packet.hook, frame, packet.src().ip(), packet.family)
    }

    /// `sender`: to whom an answer by a process of this node goes.
    pub(crate) fn follow(
        &self,
        hook: HookId,
        frame: &[u8],
        sender: IpAddr,
        family: Family,
    ) -> Result<Became> {
        let world = World::new(family);
        let run = self.run(hook, frame)?;
        if dropped(run.outcome) {
            return Ok(match run.action {
                Action::Redirect => Became::Refused(run.frame),
                _ => Became::Dropped(run.outcome),
            });
        }
        let answered_at = match run.outcome {
            "to_pod" | "restored" => HookId::FromPod,
            "to_overlay" => HookId::FromOverlay,
            "left_to_tc" => {
                ensure!(run.frame == frame, "what is left to tc is as it came");
                let mut became = self.follow(HookId::FromWire, &run.frame, sender, family)?;
                if let Became::Passed(left) = &mut became {
                    left.outcomes.insert(0, run.outcome);
                }
                return Ok(became);
            }
            _ if hook == HookId::XdpWire => HookId::XdpWire,
            // a process of the node answers, by the device that leads to who asked
            "stack_host" if [world.pod, world.other_pod].contains(&sender) => HookId::ToPod,
            "stack_host" if sender == world.overlay_pod => HookId::ToOverlay,
            "stack_host" => HookId::ToWire,
            "stack_outside" if hook == HookId::FromPod => {
                let mut became = self.follow(HookId::ToWire, &run.frame, sender, family)?;
                if let Became::Passed(left) = &mut became {
                    left.outcomes.insert(0, run.outcome);
                }
                return Ok(became);
            }
            _ => HookId::FromWire,
        };
        Ok(Became::Passed(Left { frame: run.frame, answered_at, outcomes: vec![run.outcome] }))
    }
}

/// Services beside those the world has: several backends, of all kinds; at the node's ports; at balancers' addresses.
fn furnish(rig: &mut Rig, family: Family, world: &World, base: u32) -> Result<()> {
    let web = |address: IpAddr| at(address, 8080);
    let anybody =
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
        add(at(service, 83), &anybody, Scope::Any, 0, 0)?;
        add(at(service, 84), &anybody, Scope::Any, ServiceFlags::HASH, 0)?;
        add(at(service, 85), &anybody, Scope::Any, 0, 10)?;
        add(at(world.host, 30_080), &anybody, Scope::Any, 0, 0)?;
        let [cluster, local, direct, guarded] = balancers(family);
        add(at(cluster, 80), &[web(world.host), web(world.wire_pod)], Scope::Any, 0, 0)?;
        add(at(local, 80), &anybody[1..3], Scope::Any, ServiceFlags::OUTSIDE, 0)?;
        add(at(local, 80), &anybody[..1], Scope::Outside, ServiceFlags::LOCAL, 0)?;
        add(at(direct, 80), &anybody[..4], Scope::Any, ServiceFlags::HASH | ServiceFlags::DSR, 0)?;
        add(at(world.host, HOST_PORT), &[web(world.pod)], Scope::Any, ServiceFlags::HOST_PORT, 0)?;
        add(at(guarded, 80), &anybody[1..3], Scope::Any, ServiceFlags::SOURCE_RANGES, 0)?;
        // the row's number is one more than its first slot
        rig.allow_source_range(first - 1, (world.exempt, if family == Family::V4 { 32 } else { 128 }))?;
    }
    Ok(())
}
