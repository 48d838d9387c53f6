//! Every question the services give rise to, put to the tables and to the oracle; and what the tables are whatever is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::abi::{Scope, Service, ServiceFlags, ServiceKey};
use dataplane_oracle::{self as oracle, Client, Destination, Location, Protocol, Rules, Topology, Verdict};
use serde_json::Value;

use super::{
    agent::Agent,
    cluster::{self, NODES, PODS, number},
    datapath::Asks,
    objects,
};

/// A service and its slices as they were told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    pub(crate) service: Option<Value>,
    pub(crate) slices: BTreeMap<usize, Value>,
}

/// Whoever may ask: on each node two pods and the host, and a stranger through it.
fn clients() -> Vec<(usize, Client<'static>)> {
    let mut clients = Vec::new();
    for (node, (name, _)) in NODES.into_iter().enumerate() {
        for family in 0..2 {
            for pod in 0..PODS {
                clients.push((node, Location::Pod(name), cluster::pod_addresses(node, pod)[family]));
            }
            clients.push((node, Location::Host(name), cluster::node_addresses(node)[family]));
            clients.push((node, Location::Outside { via: name }, cluster::outside_addresses()[family]));
        }
    }
    clients.into_iter().map(|(node, location, address)| (node, Client { location, address })).collect()
}

/// Where a service may be asked at all, whether or not it is.
fn questions(service: usize) -> Vec<Destination> {
    let mut addresses: Vec<IpAddr> = objects::cluster_ips(service).into();
    addresses.extend(objects::pool());
    let mut questions = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        // and one that no service has
        for port in 1..5 {
            let port = objects::first_port(service) + port;
            questions.extend(addresses.iter().map(|address| Destination {
                address: *address,
                port,
                protocol,
            }));
        }
        for port in 1..4 {
            let port = objects::node_port(objects::first_port(service) + port);
            let nodes = (0..NODES.len()).flat_map(cluster::node_addresses);
            let everywhere = nodes.chain([IpAddr::from([127, 0, 0, 1])]);
            questions.extend(everywhere.map(|address| Destination { address, port, protocol }));
        }
    }
    questions
}

/// Everybody asks a service everything: the tables answer as the oracle does.
pub(crate) fn ask(agents: &[Agent], world: &Topology, service: usize, told: &Told) -> Result<(), String> {
    for question in questions(service) {
        for (node, client) in clients() {
            if client.address.is_ipv4() != question.address.is_ipv4() {
                continue;
            }
            let expected = expected(world, told, &client, &question);
            let said = answer(agents, node, &client, &question);
            if said != expected {
                return Err(format!(
                    "{:?} {} asks {}:{}/{}: the tables say {said}, the oracle {expected}",
                    client.location,
                    client.address,
                    question.address,
                    question.port,
                    question.protocol.name(),
                ));
            }
        }
    }
    Ok(())
}

fn expected(world: &Topology, told: &Told, client: &Client<'_>, question: &Destination) -> Verdict {
    let Some(service) = &told.service else { return Verdict::NoFrontend };
    let slices: Vec<Value> = told.slices.values().cloned().collect();
    // tables know of sockets no more than that they might be translated
    let rules = Rules { sctp_from_host_to_own_node: true, ..Rules::DATAPATH };
    oracle::verdict(rules, world, service, &slices, client, question).expect("objects as the API has them")
}

/// The way of a question: to the node whose address it names, else to the first.
fn answer(agents: &[Agent], first: usize, client: &Client<'_>, question: &Destination) -> Verdict {
    let node = (0..NODES.len())
        .find(|node| cluster::node_addresses(*node).contains(&question.address))
        .unwrap_or(first);
    let of_node =
        cluster::node_addresses(node).into_iter().find(|it| it.is_ipv4() == client.address.is_ipv4());
    let is_stranger = matches!(client.location, Location::Outside { .. });
    if is_stranger && question.address.is_loopback() {
        return Verdict::NoFrontend;
    }
    agents[node].tables.answer(
        question,
        Asks {
            client: client.address,
            from_outside: is_stranger || node != first,
            of_host: matches!(client.location, Location::Host(_)) && node == first,
            node: of_node.expect("a node of both families"),
        },
    )
}

/// What holds of a node's tables, by itself and with what was told.
pub(crate) fn look(agent: &Agent, world: &Topology, told: &[Told]) -> Result<(), String> {
    let rows: BTreeMap<ServiceKey, Service> = agent.tables.services.rows().into_iter().collect();
    for (key, row) in &rows {
        owned(agent, world, told, key)?;
        scoped(&rows, key, row)?;
        let affinity = affinity(told, key);
        if key.port.get() != 0 && row.affinity_timeout != affinity {
            return Err(format!("{key:?} has an affinity of {} s, not {affinity}", row.affinity_timeout));
        }
    }
    let ranges = ranges(agent, &rows)?;
    let slots: u64 = ranges.iter().map(|(_, count)| u64::from(*count)).sum();
    // those that have rested are free as soon as somebody wants some
    if agent.slots_used() < slots {
        return Err(format!("{slots} slots are in rows, {} are known to be", agent.slots_used()));
    }
    Ok(())
}

/// No frontend is there that no service has.
fn owned(agent: &Agent, world: &Topology, told: &[Told], key: &ServiceKey) -> Result<(), String> {
    let protocol =
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|it| number(*it) == key.protocol);
    let is_node_port = *key == key.at_node();
    let address = if is_node_port {
        cluster::node_addresses(agent.node)[usize::from(!key.addr.is_v4())]
    } else {
        key.addr.to_ip()
    };
    let (name, _) = NODES[agent.node];
    let client = Client {
        location: Location::Outside { via: name },
        address: cluster::outside_addresses()[usize::from(!key.addr.is_v4())],
    };
    let wanted = match protocol {
        Some(protocol) => {
            let question = Destination { address, port: key.port.get(), protocol };
            let owner = told.get(objects::owner_of(key.port.get()));
            owner.is_some_and(|told| expected(world, told, &client, &question) != Verdict::NoFrontend)
        }
        // the address as such
        None => told.iter().any(|told| {
            let question = Destination { address, port: u16::MAX, protocol: Protocol::Tcp };
            expected(world, told, &client, &question) == Verdict::Rejected
        }),
    };
    if wanted { Ok(()) } else { Err(format!("{}: nobody wants {key:?}", NODES[agent.node].0)) }
}

/// A row for the outside is there exactly if the other says so.
fn scoped(rows: &BTreeMap<ServiceKey, Service>, key: &ServiceKey, row: &Service) -> Result<(), String> {
    let other = if key.scope == Scope::Any as u8 { Scope::Outside } else { Scope::Any };
    let other = rows.get(&ServiceKey { scope: other as u8, ..*key });
    let says = |row: &Service| row.flags & ServiceFlags::OUTSIDE != 0;
    let is_right = match (key.scope == Scope::Any as u8, other) {
        (true, other) => says(row) == other.is_some(),
        (false, other) => !says(row) && other.is_some_and(says),
    };
    if is_right { Ok(()) } else { Err(format!("{key:?} has flags {}, beside it is {other:?}", row.flags)) }
}

fn affinity(told: &[Told], key: &ServiceKey) -> u32 {
    let service = told.get(objects::owner_of(key.port.get())).and_then(|told| told.service.as_ref());
    let seconds =
        service.and_then(|it| it["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].as_u64());
    seconds.unwrap_or(0) as u32
}

/// The ranges of all rows, none of which touches another; who stands in them has a number of his own, which is in use.
fn ranges(agent: &Agent, rows: &BTreeMap<ServiceKey, Service>) -> Result<BTreeSet<(u32, u32)>, String> {
    let ranges: BTreeSet<(u32, u32)> =
        rows.values().filter(|row| row.count > 0).map(|row| (row.first_slot, row.count)).collect();
    let mut end = 0;
    for (first, count) in &ranges {
        if *first < end {
            return Err(format!("a range begins at {first}, before the last has ended at {end}"));
        }
        end = first + count;
    }
    let mut numbers = BTreeMap::new();
    for (key, row) in rows {
        let slots = agent.tables.range(row);
        for slot in &slots {
            let backend = (slot.addr, slot.port, key.protocol);
            if *numbers.entry(slot.id).or_insert(backend) != backend {
                return Err(format!("number {} is that of two backends", slot.id));
            }
            let generation = agent.tables.generations.row(&slot.id);
            if generation != Some(slot.generation) || slot.generation % 2 == 0 {
                return Err(format!("{slot:?} of {key:?}: the number's generation is {generation:?}"));
            }
        }
        let ids: Vec<u32> = slots.iter().map(|slot| slot.id).collect();
        if row.flags & ServiceFlags::HASH == 0 && !ids.is_sorted() {
            return Err(format!("{key:?}: slots out of order: {ids:?}"));
        }
    }
    let backends: BTreeSet<_> = numbers.values().collect();
    if backends.len() != numbers.len() {
        return Err(format!("a backend has two numbers: {numbers:?}"));
    }
    let unused: Vec<u32> =
        numbers.keys().filter(|id| !agent.tables.numbers_in_use().contains(id)).copied().collect();
    if unused.is_empty() { Ok(ranges) } else { Err(format!("numbers in ranges that nobody has: {unused:?}")) }
}
