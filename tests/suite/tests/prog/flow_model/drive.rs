//! Runs events against the programs and the model, and compares after each packet.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    ops::{Range, RangeInclusive},
};

use anyhow::{Result, anyhow, bail, ensure};
use dataplane_common::{
    abi::{Flow, NodeConfig, Port},
    reason::HookId,
};
use dataplane_testkit::prog::{FLOWS, Family, Frame, Rig, World, per_packet_udp, rig_with, uplink};
use proptest::sample::Index;

use super::{
    agent::FIRST_BACKEND,
    clock,
    connection::{Sign, Tuple},
    events::{Client, Depth, Event, Host, Target},
    frames,
    node::{Node, Packet, Place, Seen, world},
    services::services,
    table::{Created, Table},
};

/// The loaded programs.
pub(crate) struct Programs {
    rig: Rig,
    ports: RangeInclusive<u16>,
}

/// One sequence of events.
pub(crate) struct Sequence<'a> {
    pub(crate) rig: &'a mut Rig,
    pub(crate) node: Node,
    window: Range<i64>,
    /// Seconds of the real clock at the beginning.
    start: u32,
    /// Seconds by which the clock of the programs is ahead of the model's.
    shift: i64,
    /// As the last program left them.
    records: Vec<Flow>,
    pub(crate) next_backend: u32,
    /// Numbers of each backend of a service.
    pub(crate) backend_ids: BTreeMap<(usize, SocketAddr), Vec<u32>>,
    clients: Vec<(Tuple, HookId)>,
    /// Packets that left.
    sent: Vec<(Tuple, Vec<u8>)>,
    next_flood_port: u16,
    pub(crate) packets: u32,
    /// How often each hook had each outcome.
    outcomes: BTreeMap<String, u32>,
    pub(crate) log: Vec<String>,
}

impl Programs {
    pub(crate) fn load(ports: RangeInclusive<u16>) -> Result<Self> {
        let (first, last) = (Port::new(*ports.start()), Port::new(*ports.end()));
        let config = NodeConfig { snat_first: first, snat_last: last, ..per_packet_udp() };
        let (mut rig, _) = rig_with(Family::V4, &config)?;
        uplink(&Family::BOTH)?;
        rig.device_without_address()?;
        Ok(Self { rig, ports })
    }

    /// An empty flow table, rows without flow hints, and all backends.
    ///
    /// `window`: nanoseconds of each second in which programs run.
    pub(crate) fn begin(&mut self, is_examined: bool, window: Range<i64>) -> Result<Sequence<'_>> {
        self.rig.remove_flows()?;
        for family in Family::BOTH {
            World::new(family).fill(&mut self.rig)?;
            self.rig.host_with_node_ports(World::new(family).host)?;
        }
        self.rig.change_variables(|variables| variables.egress_stack = 0)?;
        let start = clock::seconds()?;
        let table = Table::new(FLOWS, self.ports.clone(), start, is_examined);
        let node = Node { table, services: services(), egress_by_stack: false };
        let mut sequence = Sequence {
            rig: &mut self.rig,
            node,
            window,
            start,
            shift: 0,
            records: vec![Flow::default(); FLOWS as usize],
            next_backend: FIRST_BACKEND,
            backend_ids: BTreeMap::new(),
            clients: Vec::new(),
            sent: Vec::new(),
            next_flood_port: 10_000,
            packets: 0,
            outcomes: BTreeMap::new(),
            log: Vec::new(),
        };
        for number in 0..sequence.node.services.len() {
            sequence.write_service(number)?;
        }
        Ok(sequence)
    }
}

impl Sequence<'_> {
    pub(crate) fn run(&mut self, events: &[Event]) -> Result<()> {
        for event in events {
            self.log.push(format!("{event:?}"));
            self.on_event(event)?;
        }
        self.check_index()
    }

    /// How often what the test is about has happened.
    pub(crate) fn seen(self) -> BTreeMap<String, u32> {
        let mut seen = self.outcomes;
        seen.extend(self.node.table.seen);
        seen
    }

    fn on_event(&mut self, event: &Event) -> Result<()> {
        match *event {
            Event::Send { from, to, protocol, sign, at_driver } => {
                self.client_packet(from, to, protocol, sign, at_driver)
            }
            Event::Connect { from, to, protocol, depth, at_driver } => {
                self.connect(from, to, protocol, depth, at_driver)
            }
            Event::Flood { from, to, protocol, depth, count } => {
                // of which later events see few
                let (clients, sent) = (self.clients.len() + 2, self.sent.len() + 2);
                for _ in 0..count {
                    self.next_flood_port += 1;
                    self.connect(Client { port: self.next_flood_port, ..from }, to, protocol, depth, false)?;
                    self.clients.truncate(clients);
                    self.sent.truncate(sent);
                }
                self.check_index()
            }
            Event::More { client, sign, at_driver } => {
                let Some((tuple, hook)) = pick(&self.clients, client) else { return Ok(()) };
                self.packet(tuple, sign, first_hook(hook, at_driver))
            }
            Event::Answer { peer, sign, at_driver, other_port } => {
                let Some((sent, _)) = pick(&self.sent, peer) else { return Ok(()) };
                self.answer(sent, sign, at_driver, other_port)
            }
            Event::Error { peer, from_end } => {
                let Some((sent, frame)) = pick(&self.sent, peer) else { return Ok(()) };
                self.error(sent, &frame, from_end)
            }
            Event::Misdirected { peer } => {
                let Some((sent, _)) = pick(&self.sent, peer) else { return Ok(()) };
                let hook =
                    if Node::place(sent.src.ip()) == Place::Pod { HookId::FromWire } else { HookId::FromPod };
                self.packet(sent, Sign::Data, hook)
            }
            Event::Wait { seconds } => {
                // the programs' clock begins when the machine starts
                let limit = self.start + self.start.saturating_sub(10);
                self.node.table.now = (self.node.table.now + seconds).min(limit);
                self.check_index()
            }
            Event::ToggleBackend { client, backend } => {
                let Some((tuple, _)) = pick(&self.clients, client) else { return Ok(()) };
                self.toggle_backend(tuple, backend)
            }
            Event::EgressByStack { enabled } => {
                self.node.egress_by_stack = enabled;
                self.rig.change_variables(|variables| variables.egress_stack = enabled.into())
            }
        }
    }

    fn client_packet(
        &mut self,
        from: Client,
        to: Target,
        protocol: u8,
        sign: Sign,
        at_driver: bool,
    ) -> Result<()> {
        let (mut src, mut dst) = (from.addr(), to.addr(from.family));
        let protocol = if protocol == 1 && from.family == Family::V6 { 58 } else { protocol };
        if [1, 58].contains(&protocol) {
            dst.set_port(from.port);
            src.set_port(from.port);
        }
        let hook = if from.host == Host::Outside { HookId::FromWire } else { HookId::FromPod };
        let tuple = Tuple { protocol, src, dst };
        if src.ip() == dst.ip() || (from.host == Host::Outside) && Node::place(dst.ip()) == Place::OtherNode {
            return Ok(());
        }
        if !self.clients.contains(&(tuple, hook)) {
            self.clients.push((tuple, hook));
        }
        self.packet(tuple, sign, first_hook(hook, at_driver))
    }

    fn connect(
        &mut self,
        from: Client,
        to: Target,
        protocol: u8,
        depth: Depth,
        at_driver: bool,
    ) -> Result<()> {
        let number = self.sent.len();
        self.client_packet(from, to, protocol, Sign::Open, at_driver)?;
        let Some((sent, _)) = self.sent.get(number).cloned() else { return Ok(()) };
        let answer = |run: &mut Self, sign| run.answer(sent, sign, at_driver, false);
        if depth >= Depth::Answered {
            answer(self, Sign::OpenAnswer)?;
        }
        if depth >= Depth::Confirmed {
            self.client_packet(from, to, protocol, Sign::Data, at_driver)?;
        }
        if depth >= Depth::Closed {
            self.client_packet(from, to, protocol, Sign::End, at_driver)?;
            answer(self, Sign::End)?;
            self.client_packet(from, to, protocol, Sign::Data, at_driver)?;
        }
        Ok(())
    }

    fn answer(&mut self, sent: Tuple, sign: Sign, at_driver: bool, other_port: bool) -> Result<()> {
        let mut tuple = sent.reversed();
        if other_port {
            tuple.src.set_port(tuple.src.port() ^ 1);
        }
        let is_echo = [1, 58].contains(&sent.protocol);
        if is_echo {
            tuple.dst.set_port(tuple.src.port());
        }
        let sign = if is_echo { Sign::EchoReply } else { sign };
        match Node::place(sent.dst.ip()) {
            Place::Host => Ok(()),
            Place::Pod => self.packet(tuple, sign, HookId::FromPod),
            Place::OtherNode | Place::Outside => {
                self.packet(tuple, sign, first_hook(HookId::FromWire, at_driver))
            }
        }
    }

    /// A packet through all hooks that see it.
    fn packet(&mut self, mut tuple: Tuple, sign: Sign, mut hook: HookId) -> Result<()> {
        let sign = frames::normal(tuple.protocol, sign);
        let mut frame = frames::build(tuple, sign);
        loop {
            let (seen, out) = self.program(hook, &frame)?;
            let packet = Packet { tuple, sign };
            self.log.push(format!("  {} {packet:?}: {seen:?}", hook.name()));
            let judged = match hook {
                HookId::FromPod => self.node.at_from_pod(packet, &seen),
                HookId::FromWire => self.node.at_from_wire(packet, &seen),
                HookId::XdpWire => self.node.at_xdp_wire(packet, &seen),
                HookId::ToWire => self.node.at_to_wire(packet, &seen),
                HookId::ToPod => self.node.at_to_pod(packet, &seen),
                _ => bail!("{} is not in the model", hook.name()),
            };
            judged.map_err(|wrong| anyhow!("{} {packet:?}: {wrong}", hook.name()))?;
            self.check_records()?;
            *self.outcomes.entry(format!("{} {}", hook.name(), seen.outcome)).or_default() += 1;
            (tuple, frame) = (seen.tuple, out);
            hook = match (hook, seen.outcome) {
                (HookId::XdpWire, "left_to_tc") => HookId::FromWire,
                (HookId::FromPod, "stack_outside") => HookId::ToWire,
                (HookId::FromWire, "stack_pod") => HookId::ToPod,
                (_, "to_wire" | "to_outside" | "to_pod" | "masqueraded" | "delivered" | "restored") => {
                    self.sent.push((tuple, frame));
                    return Ok(());
                }
                _ => return Ok(()),
            };
        }
    }

    /// "Packet too big" about a packet that left the node.
    fn error(&mut self, sent: Tuple, frame: &[u8], from_end: bool) -> Result<()> {
        if Node::place(sent.dst.ip()) == Place::Pod || Node::place(sent.src.ip()) == Place::OtherNode {
            return Ok(());
        }
        let router = if from_end { sent.dst.ip() } else { world(sent.dst.ip()).wire_node };
        let error = Frame::too_big(router, sent.src.ip(), frame).build();
        let (seen, out) = self.program(HookId::FromWire, &error)?;
        let quoted = frames::quoted_tuple(&out)?;
        self.log.push(format!("  error about {sent:?} from {router}: {seen:?}, quotes {quoted:?}"));
        self.node
            .at_error_from_wire(sent, router, &seen, quoted)
            .map_err(|wrong| anyhow!("error about {sent:?} from {router}: {wrong}"))?;
        ensure!(seen.created.is_none(), "an error made a flow");
        *self.outcomes.entry(format!("error {}", seen.outcome)).or_default() += 1;
        self.check_records()
    }

    /// Runs a program at a known second.
    fn program(&mut self, hook: HookId, frame: &[u8]) -> Result<(Seen, Vec<u8>)> {
        self.packets += 1;
        let second = self.synchronize()?;
        if self.node.table.is_examined {
            self.rig.forget_slots()?;
        }
        let run = self.rig.run(hook, frame)?;
        if clock::seconds()? != second {
            return Err(clock::SecondEnded.into());
        }
        let records = self.rig.flow_records()?;
        let changed: Vec<_> =
            (0..records.len()).filter(|slot| records[*slot].epoch != self.records[*slot].epoch).collect();
        ensure!(changed.len() <= 1, "a packet took several slots: {changed:?}");
        let created = changed.first().map(|slot| {
            let record = records[*slot];
            Created { slot: *slot as u32, record: (record.last_seen != 0).then_some(record) }
        });
        self.records = records;
        let tuple = frames::tuple(&run.frame)?;
        Ok((Seen { outcome: run.outcome, tuple, created }, run.frame))
    }

    /// Gives the records the age they have in the model. Returns the second of the real clock, of
    /// which enough is left to run a program.
    fn synchronize(&mut self) -> Result<u32> {
        let second = clock::second_within(&self.window)?;
        let shift = i64::from(second) - i64::from(self.node.table.now);
        if shift != self.shift {
            let by = i32::try_from(shift - self.shift)?;
            let move_second = |second: &mut u32| {
                if *second != 0 {
                    *second = second.saturating_add_signed(by);
                }
            };
            self.rig.age_flows(|flow| {
                move_second(&mut flow.last_seen);
                move_second(&mut flow.created);
            })?;
            self.rig.advance_generation()?;
            self.shift = shift;
        }
        Ok(second)
    }

    fn check_records(&self) -> Result<()> {
        self.node.table.check_records(&self.records, self.shift).map_err(|wrong| anyhow!("{wrong}"))
    }

    fn check_index(&mut self) -> Result<()> {
        let mut entries = BTreeMap::new();
        for (key, reference) in self.rig.flow_index()? {
            let epoch = self.records[reference.slot as usize].epoch;
            ensure!(epoch == reference.epoch, "{key:?} refers to a flow of another epoch");
            entries.insert(Tuple::of_key(&key), reference.slot);
        }
        self.node.table.check_index(&entries).map_err(|wrong| anyhow!("{wrong}"))
    }
}

const fn first_hook(hook: HookId, at_driver: bool) -> HookId {
    match hook {
        HookId::FromWire if at_driver => HookId::XdpWire,
        _ => hook,
    }
}

fn pick<T: Clone>(list: &[T], index: Index) -> Option<T> {
    (!list.is_empty()).then(|| index.get(list).clone())
}
