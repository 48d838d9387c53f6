//! The node of the model: where addresses are, and what each hook does with a packet.

use std::net::IpAddr;

use dataplane_testkit::prog::{Family, World, at};

use super::{
    connection::{SCTP, Side, Sign, TCP, Tuple, UDP},
    flow::Purpose,
    services::Service,
    table::{Created, Destination, Hook, Plan, Refusal, Table, Wrong},
};

/// What an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Pod,
    Host,
    OtherNode,
    Outside,
}

/// A packet at a hook.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) tuple: Tuple,
    pub(crate) sign: Sign,
}

/// What the program did with it.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) outcome: &'static str,
    /// The packet's tuple afterwards.
    pub(crate) tuple: Tuple,
    pub(crate) created: Option<Created>,
}

/// The result of one look into the flow table.
enum Pass {
    Untranslated,
    /// `towards`: where it goes, which is not its destination with direct server return.
    Translated {
        tuple: Tuple,
        towards: IpAddr,
        purpose: Purpose,
        via_stack: bool,
    },
    Dropped(&'static str),
}

pub(crate) struct Node {
    pub(crate) table: Table,
    pub(crate) services: Vec<Service>,
    /// Packets between pods and the outside take the kernel's stack.
    pub(crate) egress_by_stack: bool,
}

const SERVICES: Hook = Hook { services: true, masquerade: false, is_behind_stack: false };
const ANY: Hook = Hook { services: true, masquerade: true, is_behind_stack: false };
const BEHIND_STACK: Hook = Hook { services: false, masquerade: true, is_behind_stack: true };

impl Node {
    pub(crate) fn place(ip: IpAddr) -> Place {
        let world = world(ip);
        match ip {
            _ if ip == world.pod || ip == world.other_pod => Place::Pod,
            _ if ip == world.host => Place::Host,
            _ if ip == world.wire_pod || ip == world.wire_node => Place::OtherNode,
            _ => Place::Outside,
        }
    }

    pub(crate) fn is_here(ip: IpAddr) -> bool {
        matches!(Self::place(ip), Place::Pod | Place::Host)
    }

    pub(crate) fn at_from_pod(&mut self, packet: Packet, seen: &Seen) -> Result<(), Wrong> {
        let Packet { tuple, .. } = packet;
        if Self::place(tuple.src.ip()) != Place::Pod {
            return expect(seen, &["source_not_owned"], tuple);
        }
        let place = Self::place(tuple.dst.ip());
        let past_stack = place == Place::Outside && !self.egress_by_stack;
        let pass = match place {
            Place::Outside => {
                let hook = Hook { masquerade: past_stack, ..SERVICES };
                match self.select(packet, hook, false, seen)? {
                    Pass::Untranslated if past_stack => self.masquerade(packet, hook, seen)?,
                    pass => pass,
                }
            }
            Place::Host => self.select(packet, SERVICES, false, seen)?,
            Place::Pod | Place::OtherNode => self.look_up(packet, ANY),
        };
        let outcome = match pass {
            Pass::Dropped(reason) => return expect(seen, &[reason], tuple),
            Pass::Translated { purpose: Purpose::Masquerade | Purpose::Inbound, tuple, .. } if past_stack => {
                return expect(seen, &["to_outside"], tuple);
            }
            Pass::Untranslated if past_stack => "to_outside",
            Pass::Untranslated => delivery(tuple.dst.ip(), false),
            Pass::Translated { tuple: to, towards, .. } => {
                return expect(seen, &[delivery(towards, to.src != tuple.src)], to);
            }
        };
        expect(seen, &[outcome], tuple)
    }

    pub(crate) fn at_from_wire(&mut self, packet: Packet, seen: &Seen) -> Result<(), Wrong> {
        let Packet { tuple, sign } = packet;
        if Self::is_here(tuple.src.ip()) {
            return expect(seen, &["source_is_local"], tuple);
        }
        let (mut to, mut towards, mut is_translated) = (tuple, tuple.dst.ip(), false);
        if Self::place(tuple.dst.ip()) != Place::Pod {
            match self.select(packet, SERVICES, true, seen)? {
                Pass::Untranslated => {}
                Pass::Translated { tuple, via_stack: true, .. } => {
                    return expect(seen, &["stack_pod"], tuple);
                }
                Pass::Translated { tuple, towards: next, .. } => {
                    (to, towards, is_translated) = (tuple, next, true);
                }
                Pass::Dropped(reason) => return expect(seen, &[reason], tuple),
            }
        }
        let by_stack = self.egress_by_stack && Self::place(tuple.src.ip()) == Place::Outside;
        if Self::place(towards) == Place::Pod
            && let Pass::Translated { tuple, towards: next, purpose, .. } =
                self.look_up(Packet { tuple: to, sign }, ANY)
        {
            if purpose == Purpose::Inbound && by_stack {
                return expect(seen, &["stack_pod"], tuple);
            }
            (to, towards, is_translated) = (tuple, next, true);
        }
        if is_translated {
            return expect(seen, &[delivery(towards, to.src != tuple.src)], to);
        }
        let outcome = match Self::place(tuple.dst.ip()) {
            Place::Pod => {
                self.remember_inbound(packet, seen)?;
                if by_stack { "stack_pod" } else { "to_pod" }
            }
            Place::Host => "stack_host",
            Place::OtherNode | Place::Outside => "stack_unmanaged",
        };
        expect(seen, &[outcome], tuple)
    }

    pub(crate) fn at_xdp_wire(&mut self, packet: Packet, seen: &Seen) -> Result<(), Wrong> {
        let Packet { tuple, .. } = packet;
        let may_have_flow = [TCP, UDP, SCTP].contains(&tuple.protocol)
            && matches!(Self::place(tuple.dst.ip()), Place::Host | Place::Outside);
        if !may_have_flow {
            return expect(seen, &["left_to_tc"], tuple);
        }
        if Self::is_here(tuple.src.ip()) {
            return expect(seen, &["source_is_local"], tuple);
        }
        match self.select(packet, SERVICES, true, seen)? {
            Pass::Translated { tuple: to, towards, .. } if seen.outcome != "left_to_tc" => {
                match Self::place(towards) {
                    Place::OtherNode => expect(seen, &["to_wire"], to),
                    Place::Outside => expect(seen, &["to_outside"], to),
                    Place::Pod | Place::Host => expect(seen, &["left_to_tc"], tuple),
                }
            }
            Pass::Dropped(reason) if reason != "no_backend" => expect(seen, &[reason], tuple),
            _ => expect(seen, &["left_to_tc"], tuple),
        }
    }

    pub(crate) fn at_to_wire(&mut self, packet: Packet, seen: &Seen) -> Result<(), Wrong> {
        let tuple = packet.tuple;
        match self.masquerade(packet, BEHIND_STACK, seen)? {
            Pass::Translated { tuple: to, .. } if to.src != tuple.src => expect(seen, &["masqueraded"], to),
            Pass::Dropped(reason) => expect(seen, &[reason], tuple),
            _ => expect(seen, &["delivered"], tuple),
        }
    }

    pub(crate) fn at_to_pod(&mut self, packet: Packet, seen: &Seen) -> Result<(), Wrong> {
        match self.look_up(packet, ANY) {
            // looked up only if packets to the pod may have flows
            Pass::Translated { purpose: Purpose::Inbound, tuple, .. } => {
                expect(seen, &["restored", "delivered"], tuple)
            }
            Pass::Translated { tuple, .. } => expect(seen, &["restored"], tuple),
            _ => expect(seen, &["delivered"], packet.tuple),
        }
    }

    /// An ICMP error about a packet that left as `quoted`, from a router or, with `from_end`, from
    /// the machine that it was for.
    pub(crate) fn at_error_from_wire(
        &mut self,
        quoted: Tuple,
        router: IpAddr,
        seen: &Seen,
        seen_quoted: Tuple,
    ) -> Result<(), Wrong> {
        // (what a packet of the flow in the error's direction has, what it leaves with)
        let mut tuple = quoted.reversed();
        let mut source = router;
        let (mut is_translated, mut is_inbound) = (false, false);
        if Self::is_here(source) {
            return expect(seen, &["source_is_local"], error_tuple(tuple, source));
        }
        for hook in [SERVICES, ANY] {
            if (Self::place(tuple.dst.ip()) == Place::Pod) != hook.masquerade {
                continue;
            }
            if let Some((flow, side)) = self.table.on_error(tuple, hook) {
                let to = flow.translated(side);
                let via_stack = flow.via_stack;
                source = if source == tuple.src.ip() { to.src.ip() } else { source };
                (tuple, is_translated, is_inbound) = (to, true, flow.purpose == Purpose::Inbound);
                if via_stack && !hook.masquerade {
                    expect_quoted(seen_quoted, tuple)?;
                    return expect(seen, &["stack_pod"], error_tuple(tuple, source));
                }
            }
        }
        expect_quoted(seen_quoted, tuple)?;
        let is_outside = Self::place(source) == Place::Outside;
        let outcome = match Self::place(tuple.dst.ip()) {
            Place::Pod if (!is_translated || is_inbound) && self.egress_by_stack && is_outside => "stack_pod",
            Place::Pod => "to_pod",
            Place::Host => "stack_host",
            Place::OtherNode if is_translated => "to_wire",
            Place::Outside if is_translated => "to_outside",
            Place::OtherNode | Place::Outside => "stack_unmanaged",
        };
        expect(seen, &[outcome], error_tuple(tuple, source))
    }

    fn look_up(&mut self, packet: Packet, hook: Hook) -> Pass {
        match self.table.on_packet(packet.tuple, packet.sign, hook) {
            Some((flow, side)) => Pass::Translated {
                tuple: if flow.is_direct { packet.tuple } else { flow.translated(side) },
                towards: flow.translated(side).dst.ip(),
                purpose: flow.purpose.clone(),
                via_stack: side == Side::Server && flow.via_stack,
            },
            None => Pass::Untranslated,
        }
    }

    /// The number of the service that a packet is addressed to.
    pub(crate) fn service_of(&self, tuple: Tuple) -> Option<usize> {
        let of = |service: &Service| (service.frontend, service.protocol) == (tuple.dst, tuple.protocol);
        self.services.iter().position(of)
    }

    /// Looks up the flow, else selects a backend if the packet is addressed to a frontend.
    fn select(&mut self, packet: Packet, hook: Hook, from_outside: bool, seen: &Seen) -> Result<Pass, Wrong> {
        if let pass @ Pass::Translated { .. } = self.look_up(packet, hook) {
            return Ok(pass);
        }
        let tuple = packet.tuple;
        let Some(number) = self.service_of(tuple) else { return Ok(Pass::Untranslated) };
        let service = &self.services[number];
        let destinations = service.destinations(tuple, from_outside);
        if destinations.is_empty() {
            return Ok(Pass::Dropped(if service.is_local { "no_local_backend" } else { "no_backend" }));
        }
        let plan = Plan {
            forward: tuple,
            purpose: Purpose::Service { service: number, is_removed: false },
            destinations,
            from_outside,
            via_stack: false,
        };
        self.create(plan, seen)
    }

    /// Looks up the flow, else gives the packet the node's address.
    fn masquerade(&mut self, packet: Packet, hook: Hook, seen: &Seen) -> Result<Pass, Wrong> {
        if hook.is_behind_stack
            && let pass @ Pass::Translated { .. } = self.look_up(packet, hook)
        {
            return Ok(pass);
        }
        let (tuple, sign) = (packet.tuple, packet.sign);
        if is_answer(tuple.protocol, sign) {
            return Ok(Pass::Untranslated);
        }
        let snat = Some(world(tuple.src.ip()).host);
        let plan = Plan {
            forward: tuple,
            purpose: Purpose::Masquerade,
            destinations: vec![Destination { addr: tuple.dst, snat, is_direct: false }],
            from_outside: false,
            via_stack: hook.is_behind_stack,
        };
        self.create(plan, seen)
    }

    fn remember_inbound(&mut self, packet: Packet, seen: &Seen) -> Result<(), Wrong> {
        let Packet { tuple, sign } = packet;
        let is_flow = ![TCP, SCTP].contains(&tuple.protocol)
            && Self::place(tuple.src.ip()) == Place::Outside
            && !is_answer(tuple.protocol, sign);
        if !is_flow {
            return Ok(());
        }
        let plan = Plan {
            forward: tuple,
            purpose: Purpose::Inbound,
            destinations: vec![Destination { addr: tuple.dst, snat: None, is_direct: false }],
            from_outside: true,
            via_stack: false,
        };
        // with the table full, the packet arrives all the same
        self.table.create(plan, seen.created).map(|_best_effort| ())
    }

    fn create(&mut self, plan: Plan, seen: &Seen) -> Result<Pass, Wrong> {
        let (forward, purpose) = (plan.forward, plan.purpose.clone());
        Ok(match self.table.create(plan, seen.created)? {
            None => {
                let flow = self.table.flow(forward).ok_or("the flow is missing")?;
                let tuple = if flow.is_direct { forward } else { flow.translated(Side::Client) };
                let towards = flow.translated(Side::Client).dst.ip();
                Pass::Translated { tuple, towards, purpose, via_stack: false }
            }
            Some(Refusal::PortsExhausted) => Pass::Dropped("ports_exhausted"),
            Some(Refusal::TableFull | Refusal::TupleTaken) => Pass::Dropped("flow_table_full"),
        })
    }
}

/// Whether a packet without a flow answers another.
fn is_answer(protocol: u8, sign: Sign) -> bool {
    match protocol {
        TCP | SCTP => sign != Sign::Open,
        _ => sign == Sign::EchoReply,
    }
}

/// How a packet is forwarded towards an address.
fn delivery(towards: IpAddr, source_has_changed: bool) -> &'static str {
    match Node::place(towards) {
        Place::Pod => "to_pod",
        Place::Host => "stack_host",
        Place::OtherNode => "to_wire",
        Place::Outside if source_has_changed => "to_outside",
        Place::Outside => "stack_outside",
    }
}

/// The addresses of an ICMP error that arrives as packets of this tuple, from a source of its own.
fn error_tuple(tuple: Tuple, source: IpAddr) -> Tuple {
    let protocol = if source.is_ipv4() { 1 } else { 58 };
    Tuple { protocol, src: at(source, 0), dst: at(tuple.dst.ip(), 0) }
}

pub(crate) fn world(ip: IpAddr) -> World {
    World::new(if ip.is_ipv4() { Family::V4 } else { Family::V6 })
}

fn expect(seen: &Seen, outcomes: &[&'static str], tuple: Tuple) -> Result<(), Wrong> {
    if !outcomes.contains(&seen.outcome) {
        return Err(format!("{} ({:?}), expected {outcomes:?} ({tuple:?})", seen.outcome, seen.tuple));
    }
    if seen.tuple != tuple && !is_refusal(seen.outcome) {
        return Err(format!("{}: {:?}, expected {tuple:?}", seen.outcome, seen.tuple));
    }
    Ok(())
}

/// Whether the packet may have become an ICMP error to its sender.
fn is_refusal(outcome: &str) -> bool {
    outcome == "no_backend"
}

fn expect_quoted(seen: Tuple, expected: Tuple) -> Result<(), Wrong> {
    if seen == expected.reversed() {
        Ok(())
    } else {
        Err(format!("quotes {seen:?}, not {:?}", expected.reversed()))
    }
}
