//! Which tuple the answers to a new flow get, so that they belong to no other.

use std::net::SocketAddr;

use super::{
    connection::{Class, TCP, Tuple},
    flow::Purpose,
    table::{Destination, Plan, Refusal, Table, Wrong},
};

/// Why a port may be taken from another flow, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Availability {
    Free,
    /// Timed out, and no server is in `TIME_WAIT`.
    Forgotten,
    Closed,
    HardlyNeeded,
    Unconfirmed,
    Taken,
}

impl Table {
    /// Whether answers with this tuple come from the destination.
    pub(crate) fn may_answer(destination: Destination, reply: Tuple, plan: &Plan) -> bool {
        reply.src.ip() == destination.addr.ip()
            && (is_echo(plan.forward.protocol) || reply.src.port() == destination.addr.port())
    }

    /// Checks the reply tuple of a new flow. Returns whether its source is translated.
    pub(crate) fn check_reply_tuple(
        &mut self,
        chosen: Destination,
        reply: Tuple,
        plan: &Plan,
    ) -> Result<bool, Wrong> {
        let client = plan.forward.src;
        let kept = Tuple { protocol: plan.forward.protocol, src: chosen.addr, dst: client };
        if chosen.is_direct || chosen.snat.is_none() && self.availability(kept, plan) <= Availability::Closed
        {
            return if reply == kept {
                Ok(false)
            } else {
                Err(format!("source translated: {reply:?}, not {kept:?}"))
            };
        }
        let ports = self.available_ports(chosen, plan);
        self.note(format!("port {:?}", self.availability(reply, plan)));
        if ports.contains(&reply) {
            Ok(true)
        } else {
            Err(format!("{reply:?} is not the best port: {ports:?}"))
        }
    }

    /// The reply tuples with a port of the range that are as available as any.
    fn available_ports(&self, chosen: Destination, plan: &Plan) -> Vec<Tuple> {
        let protocol = plan.forward.protocol;
        let with_port = |port| {
            let src_port = if is_echo(protocol) { port } else { chosen.addr.port() };
            Tuple {
                protocol,
                src: SocketAddr::new(chosen.addr.ip(), src_port),
                dst: SocketAddr::new(chosen.snat.unwrap_or(plan.forward.src.ip()), port),
            }
        };
        let all: Vec<_> = self
            .ports
            .clone()
            .map(|port| (self.availability(with_port(port), plan), with_port(port)))
            .collect();
        let best = all.iter().map(|(availability, _)| *availability).min();
        let best = best.filter(|best| *best < Availability::Taken);
        all.into_iter()
            .filter(|(availability, _)| Some(*availability) == best)
            .map(|(_, tuple)| tuple)
            .collect()
    }

    pub(crate) fn check_refusal(&self, plan: &Plan) -> Result<Refusal, Wrong> {
        let is_refused = |destination: &Destination| {
            let kept =
                Tuple { protocol: plan.forward.protocol, src: destination.addr, dst: plan.forward.src };
            let keeps = destination.snat.is_none() && self.availability(kept, plan) <= Availability::Closed;
            !keeps && self.available_ports(*destination, plan).is_empty()
        };
        if plan.purpose == Purpose::Inbound {
            let kept = plan.forward.reversed();
            let is_taken = self.availability(kept, plan) > Availability::Closed;
            return if is_taken {
                Ok(Refusal::TupleTaken)
            } else {
                Err(format!("no flow, though {kept:?} is free"))
            };
        }
        if plan.destinations.iter().any(is_refused) {
            Ok(Refusal::PortsExhausted)
        } else {
            Err("no flow, though there are ports".to_owned())
        }
    }

    fn availability(&self, reply: Tuple, plan: &Plan) -> Availability {
        let Some(slot) = self.index.get(&reply) else { return Availability::Free };
        let flow = &self.flows[slot];
        // left over from an earlier connection of the same client
        if flow.forward == plan.forward {
            return Availability::Forgotten;
        }
        let (idle, connection) = (self.idle(flow), &flow.connection);
        let is_tcp = flow.forward.protocol == TCP;
        let is_closed_for = |seconds| connection.is_closed() && idle >= seconds;
        match self.class(*slot) {
            _ if connection.is_expired(idle) && (!is_tcp || idle > 60) => Availability::Forgotten,
            _ if connection.is_expired(idle) || is_closed_for(5) => Availability::Closed,
            _ if is_closed_for(1) => Availability::HardlyNeeded,
            Class::Idle => Availability::HardlyNeeded,
            Class::Outside if idle >= 1 => Availability::HardlyNeeded,
            Class::Inside if connection.is_answered() && idle >= 10 => Availability::HardlyNeeded,
            Class::Outside => Availability::Unconfirmed,
            Class::Inside if !plan.from_outside && idle >= 2 => Availability::Unconfirmed,
            _ => Availability::Taken,
        }
    }
}

fn is_echo(protocol: u8) -> bool {
    [1, 58].contains(&protocol)
}
