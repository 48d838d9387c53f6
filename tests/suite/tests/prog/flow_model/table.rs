//! The flow table as its documents describe it: which packets belong to a flow, which flow a new
//! one replaces, and which tuple its answers get.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use dataplane_common::abi::Flow as Record;

use super::{
    connection::{Class, Connection, Side, Sign, Tuple},
    flow::{Flow, Purpose},
};

/// What a hook may do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook {
    /// Flows whose forward packets it translates: of services, and masqueraded ones.
    pub(crate) services: bool,
    pub(crate) masquerade: bool,
    /// It sees packets that the kernel's stack forwards.
    pub(crate) is_behind_stack: bool,
}

/// A flow to create.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) forward: Tuple,
    pub(crate) purpose: Purpose,
    /// Where its packets may go.
    pub(crate) destinations: Vec<Destination>,
    pub(crate) from_outside: bool,
    pub(crate) via_stack: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Destination {
    pub(crate) addr: SocketAddr,
    /// The address that replaces the client's.
    pub(crate) snat: Option<IpAddr>,
    pub(crate) is_direct: bool,
}

/// A flow that the program created, or the slot in which it tried.
#[derive(Clone, Copy)]
pub(crate) struct Created {
    pub(crate) slot: u32,
    /// `None`: the slot is left free.
    pub(crate) record: Option<Record>,
}

impl std::fmt::Debug for Created {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reply = self.record.map(|record| Tuple::of_key(&record.reply));
        write!(formatter, "slot {} with answers {reply:?}", self.slot)
    }
}

pub(crate) type Wrong = String;

/// The result of a failed creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    TableFull,
    PortsExhausted,
    /// The tuple of an [`Purpose::Inbound`] flow belongs to another.
    TupleTaken,
}

pub(crate) struct Table {
    pub(crate) now: u32,
    pub(crate) slots: u32,
    pub(crate) ports: RangeInclusive<u16>,
    /// The programs examine every slot for every new flow, not once a second: the order of classes
    /// is exact.
    pub(crate) is_examined: bool,
    /// When a refused flow has last left its slot free.
    left_free_at: Option<u32>,
    /// How often each rule was applied.
    pub(crate) seen: BTreeMap<String, u32>,
    /// By slot.
    pub(crate) flows: BTreeMap<u32, Flow>,
    /// Slots by tuple as packets arrive.
    pub(crate) index: BTreeMap<Tuple, u32>,
}

impl Table {
    pub(crate) fn new(slots: u32, ports: RangeInclusive<u16>, now: u32, is_examined: bool) -> Self {
        let (seen, flows, index) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { now, slots, ports, is_examined, left_free_at: None, seen, flows, index }
    }

    pub(crate) fn note(&mut self, rule: impl Into<String>) {
        *self.seen.entry(rule.into()).or_default() += 1;
    }

    pub(crate) fn idle(&self, flow: &Flow) -> u32 {
        self.now - flow.last_seen
    }

    pub(crate) fn class(&self, slot: u32) -> Class {
        self.flows
            .get(&slot)
            .map_or(Class::Free, |flow| flow.connection.class(self.idle(flow), flow.from_outside))
    }

    /// The flow that a tuple belongs to, and whose packet it is.
    fn flow_of(&self, tuple: Tuple) -> Option<(u32, Side)> {
        let slot = *self.index.get(&tuple)?;
        let flow = &self.flows[&slot];
        if flow.connection.is_absent(self.idle(flow)) {
            return None;
        }
        Some((slot, if flow.forward == tuple { Side::Client } else { Side::Server }))
    }

    /// The flow with this forward tuple.
    pub(crate) fn flow(&self, forward: Tuple) -> Option<&Flow> {
        self.flows.get(self.index.get(&forward)?)
    }

    /// The flow of a packet at a hook, whose state it changes.
    pub(crate) fn on_packet(&mut self, tuple: Tuple, sign: Sign, hook: Hook) -> Option<(&Flow, Side)> {
        let Some((slot, side)) = self.flow_of(tuple) else {
            if self.index.contains_key(&tuple) {
                self.note("expired flow");
            }
            return None;
        };
        let (now, flow) = (self.now, self.flows.get_mut(&slot)?);
        match side {
            Side::Client if !flow.is_translated_at(hook) => return None,
            Side::Client if flow.begins_anew(sign) => {
                self.note(format!("{} anew, {sign:?}", tuple.protocol));
                return None;
            }
            // the identifier is the sender's own, so these belong to a ping of the other side
            Side::Server if sign == Sign::EchoRequest => return None,
            Side::Client if sign == Sign::EchoReply => return None,
            Side::Server
                if sign == Sign::OpenAnswer && flow.connection.is_ending() && !flow.is_source_translated =>
            {
                // the client has connected to the backend itself, from the same port
                self.index.remove(&tuple);
                self.note("direct connection from the same port");
                return None;
            }
            Side::Client => flow.via_stack = hook.is_behind_stack,
            Side::Server => {}
        }
        if flow.is_direct {
            flow.connection.on_direct_packet(sign);
        } else {
            flow.connection.on_packet(side, sign);
        }
        flow.last_seen = now;
        let rule = format!("{} {:?}", tuple.protocol, flow.connection.state());
        self.note(rule);
        Some((&self.flows[&slot], side))
    }

    /// The flow that an ICMP error at a hook belongs to. `tuple`: of an answer to the quoted
    /// packet.
    pub(crate) fn on_error(&self, tuple: Tuple, hook: Hook) -> Option<(&Flow, Side)> {
        let (slot, side) = self.flow_of(tuple)?;
        let flow = &self.flows[&slot];
        (side == Side::Server || flow.is_translated_at(hook)).then_some((flow, side))
    }

    /// Checks what the program did for a new flow, and does the same.
    pub(crate) fn create(&mut self, plan: Plan, created: Option<Created>) -> Result<Option<Refusal>, Wrong> {
        let readiest = (0..self.slots).map(|slot| self.class(slot)).min().unwrap_or(Class::Kept);
        let last = if plan.from_outside { Class::Idle } else { Class::Inside };
        // a slot that a refused flow has left free is found within a second
        let is_hidden = readiest > Class::Free || self.left_free_at == Some(self.now);
        if !self.is_examined && created.is_none() && is_hidden {
            return Ok(Some(Refusal::TableFull));
        }
        if readiest > last {
            self.note("table full");
            return match created {
                None => Ok(Some(Refusal::TableFull)),
                Some(created) => {
                    Err(format!("flow in slot {} given up: {:?}", created.slot, self.class(created.slot)))
                }
            };
        }
        let Some(created) = created else {
            return Err(format!("no flow, though there are slots {readiest:?}"));
        };
        let class = self.class(created.slot);
        if class > if self.is_examined { readiest } else { last } {
            return Err(format!("took a slot {class:?}, though one is {readiest:?}"));
        }
        self.note(format!("slot {class:?}"));
        if let Some(replaced) = self.flows.remove(&created.slot) {
            self.unlink(replaced.forward, created.slot);
            self.unlink(replaced.reply, created.slot);
        }
        let Some(record) = created.record else {
            self.left_free_at = Some(self.now);
            return self.check_refusal(&plan).map(Some);
        };
        let (forward, reply) = (Tuple::of_key(&record.forward), Tuple::of_key(&record.reply));
        if forward != plan.forward {
            return Err(format!("a flow of {forward:?} for a packet of {:?}", plan.forward));
        }
        let chosen = plan.destinations.iter().find(|candidate| Self::may_answer(**candidate, reply, &plan));
        let Some(chosen) = chosen.copied() else {
            return Err(format!("a backend of another service: {reply:?}"));
        };
        let is_source_translated = self.check_reply_tuple(chosen, reply, &plan)?;
        if !chosen.is_direct {
            self.release(reply, forward);
            self.index.insert(reply, created.slot);
        }
        self.index.insert(forward, created.slot);
        self.flows.insert(
            created.slot,
            Flow {
                forward,
                reply,
                purpose: plan.purpose,
                is_direct: chosen.is_direct,
                is_source_translated,
                from_outside: plan.from_outside,
                via_stack: plan.via_stack,
                connection: Connection::new(forward.protocol),
                last_seen: self.now,
                created: self.now,
            },
        );
        Ok(None)
    }

    /// Removes the flow that has the reply tuple, in both directions.
    fn release(&mut self, reply: Tuple, forward: Tuple) {
        let Some(slot) = self.index.get(&reply).copied() else { return };
        let owner = self.flows[&slot].forward;
        if owner != forward {
            self.unlink(owner, slot);
        }
        self.unlink(reply, slot);
    }

    fn unlink(&mut self, tuple: Tuple, slot: u32) {
        if self.index.get(&tuple) == Some(&slot) {
            self.index.remove(&tuple);
        }
    }

    /// A backend of a service is gone.
    pub(crate) fn remove_backend(&mut self, service: usize, backend: SocketAddr) {
        for flow in self.flows.values_mut() {
            if let Purpose::Service { service: of, is_removed } = &mut flow.purpose
                && *of == service
                && flow.reply.src == backend
            {
                *is_removed = true;
            }
        }
    }

    /// Compares every record. `shift`: seconds by which the records' clock is ahead.
    pub(crate) fn check_records(&self, records: &[Record], shift: i64) -> Result<(), Wrong> {
        for (slot, flow) in &self.flows {
            let record = &records[*slot as usize];
            let second = |second: u32| i64::from(second) - shift;
            let seen = (
                Tuple::of_key(&record.forward),
                Tuple::of_key(&record.reply),
                record.state,
                record.flags,
                second(record.last_seen),
                second(record.created),
            );
            let state = flow.connection.state();
            let expected = (
                flow.forward,
                flow.reply,
                state as u32,
                flow.flags(),
                i64::from(flow.last_seen),
                i64::from(flow.created),
            );
            if seen != expected {
                return Err(format!("slot {slot}: {seen:?}, expected {expected:?} ({state:?})"));
            }
        }
        Ok(())
    }

    /// Compares the index with its entries, as tuples and slots.
    pub(crate) fn check_index(&self, entries: &BTreeMap<Tuple, u32>) -> Result<(), Wrong> {
        if *entries == self.index {
            return Ok(());
        }
        let missing = self.index.iter().filter(|(tuple, slot)| entries.get(tuple) != Some(slot));
        let more = entries.iter().filter(|(tuple, slot)| self.index.get(tuple) != Some(slot));
        Err(format!(
            "index: missing {:?}, too many {:?}",
            missing.collect::<Vec<_>>(),
            more.collect::<Vec<_>>()
        ))
    }
}
