//! Compares the verdicts of the tables with the oracle for every client and frontend, and checks
//! the invariants of the tables.

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
    datapath::QueryOrigin,
    objects,
};

/// The objects of a service and its slices.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServiceFixture {
    pub(crate) service: Option<Value>,
    pub(crate) slices: BTreeMap<usize, Value>,
}

/// All clients: on each node two pods and the host, and an external client through that node.
fn clients() -> Vec<(usize, Client<'static>)> {
    let mut clients = Vec::new();
    for (node, (name, _)) in NODES.into_iter().enumerate() {
        for family in 0..2 {
            for pod in 0..PODS {
                clients.push((node, Location::Pod(name), cluster::pod_addresses(node, pod)[family]));
            }
            clients.push((node, Location::Host(name), cluster::node_addresses(node)[family]));
            clients.push((node, Location::Outside { via: name }, cluster::external_addresses()[family]));
        }
    }
    clients.into_iter().map(|(node, location, address)| (node, Client { location, address })).collect()
}

/// All addresses and ports at which the service could have a frontend.
fn queries(service: usize) -> Vec<Destination> {
    let mut addresses: Vec<IpAddr> = objects::cluster_ips(service).into();
    addresses.extend(objects::pool());
    let mut queries = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        // one port more than services have
        for port in 1..5 {
            let port = objects::first_port(service) + port;
            queries.extend(addresses.iter().map(|address| Destination { address: *address, port, protocol }));
        }
        for port in 1..4 {
            let port = objects::node_port(objects::first_port(service) + port);
            let nodes = (0..NODES.len()).flat_map(cluster::node_addresses);
            let everywhere = nodes.chain([IpAddr::from([127, 0, 0, 1])]);
            queries.extend(everywhere.map(|address| Destination { address, port, protocol }));
        }
    }
    queries
}

/// For all clients and all possible frontends of a service, the tables agree with the oracle.
pub(crate) fn compare_with_oracle(
    agents: &[Agent],
    topology: &Topology,
    service: usize,
    fixture: &ServiceFixture,
) -> Result<(), String> {
    for query in queries(service) {
        for (node, client) in clients() {
            if client.address.is_ipv4() != query.address.is_ipv4() {
                continue;
            }
            let expected = expected(topology, fixture, &client, &query);
            let verdict = verdict(agents, node, &client, &query);
            if verdict != expected {
                return Err(format!(
                    "{:?} {} to {}:{}/{}: the tables give {verdict}, the oracle {expected}",
                    client.location,
                    client.address,
                    query.address,
                    query.port,
                    query.protocol.name(),
                ));
            }
        }
    }
    Ok(())
}

fn expected(
    topology: &Topology,
    fixture: &ServiceFixture,
    client: &Client<'_>,
    query: &Destination,
) -> Verdict {
    let Some(service) = &fixture.service else { return Verdict::NoFrontend };
    let slices: Vec<Value> = fixture.slices.values().cloned().collect();
    // the tables do not show whether a socket was translated at `connect()`
    let rules = Rules { sctp_from_host_to_own_node: true, ..Rules::DATAPATH };
    oracle::verdict(rules, topology, service, &slices, client, query).expect("valid objects")
}

/// The verdict of the tables of the node that has the destination address, or else of the first.
fn verdict(agents: &[Agent], first: usize, client: &Client<'_>, query: &Destination) -> Verdict {
    let node = (0..NODES.len())
        .find(|node| cluster::node_addresses(*node).contains(&query.address))
        .unwrap_or(first);
    let of_node =
        cluster::node_addresses(node).into_iter().find(|it| it.is_ipv4() == client.address.is_ipv4());
    let is_external = matches!(client.location, Location::Outside { .. });
    if is_external && query.address.is_loopback() {
        return Verdict::NoFrontend;
    }
    agents[node].tables.verdict(
        query,
        QueryOrigin {
            client: client.address,
            is_external: is_external || node != first,
            is_host: matches!(client.location, Location::Host(_)) && node == first,
            node: of_node.expect("a node of both families"),
        },
    )
}

/// Checks the invariants of a node's tables.
pub(crate) fn check_tables(
    agent: &Agent,
    topology: &Topology,
    fixture: &[ServiceFixture],
) -> Result<(), String> {
    let rows: BTreeMap<ServiceKey, Service> = agent.tables.services.rows().into_iter().collect();
    for (key, row) in &rows {
        check_owner(agent, topology, fixture, key)?;
        check_scope(&rows, key, row)?;
        let affinity = affinity(fixture, key);
        if key.port.get() != 0 && row.affinity_timeout != affinity {
            return Err(format!("{key:?} has an affinity of {} s, not {affinity}", row.affinity_timeout));
        }
    }
    let ranges = check_slot_ranges(agent, &rows)?;
    let slots: u64 = ranges.iter().map(|(_, count)| u64::from(*count)).sum();
    // the agent may count further slots that are not yet reusable
    if agent.slots_used() < slots {
        return Err(format!("rows use {slots} slots, the agent reports {}", agent.slots_used()));
    }
    Ok(())
}

/// Checks that the row is a frontend of a service.
fn check_owner(
    agent: &Agent,
    topology: &Topology,
    fixture: &[ServiceFixture],
    key: &ServiceKey,
) -> Result<(), String> {
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
        address: cluster::external_addresses()[usize::from(!key.addr.is_v4())],
    };
    let is_frontend = match protocol {
        Some(protocol) => {
            let query = Destination { address, port: key.port.get(), protocol };
            let owner = fixture.get(objects::owner_of(key.port.get()));
            owner.is_some_and(|fixture| expected(topology, fixture, &client, &query) != Verdict::NoFrontend)
        }
        // pings to another address of a service are answered
        None if *key == ServiceKey::of_ping(key.addr) => fixture.iter().any(|fixture| {
            let ip = address.to_string();
            let service = fixture.service.as_ref();
            let lists =
                service.map(|it| [&it["spec"]["externalIPs"], &it["status"]["loadBalancer"]["ingress"]]);
            lists.is_some_and(|lists| {
                let items = lists.into_iter().filter_map(|list| list.as_array()).flatten();
                items.into_iter().any(|item| item.as_str().or(item["ip"].as_str()) == Some(&ip))
            })
        }),
        // the row for all other ports of a cluster IP
        None => fixture.iter().any(|fixture| {
            let query = Destination { address, port: u16::MAX, protocol: Protocol::Tcp };
            expected(topology, fixture, &client, &query) == Verdict::Rejected
        }),
    };
    if is_frontend { Ok(()) } else { Err(format!("{}: no service has {key:?}", NODES[agent.node].0)) }
}

/// Checks that a row of scope `Outside` exists exactly if the flags of the other row have it.
fn check_scope(rows: &BTreeMap<ServiceKey, Service>, key: &ServiceKey, row: &Service) -> Result<(), String> {
    let other = if key.scope == Scope::Any as u8 { Scope::Outside } else { Scope::Any };
    let other = rows.get(&ServiceKey { scope: other as u8, ..*key });
    let has_flag = |row: &Service| row.flags & ServiceFlags::OUTSIDE != 0;
    let is_right = match (key.scope == Scope::Any as u8, other) {
        (true, other) => has_flag(row) == other.is_some(),
        (false, other) => !has_flag(row) && other.is_some_and(has_flag),
    };
    if is_right {
        Ok(())
    } else {
        Err(format!("{key:?} has flags {}, the row of the other scope is {other:?}", row.flags))
    }
}

fn affinity(fixture: &[ServiceFixture], key: &ServiceKey) -> u32 {
    let service = fixture.get(objects::owner_of(key.port.get())).and_then(|fixture| fixture.service.as_ref());
    let seconds =
        service.and_then(|it| it["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].as_u64());
    seconds.unwrap_or(0) as u32
}

/// Checks that the slot ranges of all rows do not overlap, and that each backend in them has a
/// unique id with a current generation. Returns the ranges.
fn check_slot_ranges(
    agent: &Agent,
    rows: &BTreeMap<ServiceKey, Service>,
) -> Result<BTreeSet<(u32, u32)>, String> {
    let ranges: BTreeSet<(u32, u32)> =
        rows.values().filter(|row| row.count > 0).map(|row| (row.first_slot, row.count)).collect();
    let mut end = 0;
    for (first, count) in &ranges {
        if *first < end {
            return Err(format!("a range begins at {first}, before the end {end} of the previous one"));
        }
        end = first + count;
    }
    let mut backends_by_id = BTreeMap::new();
    for (key, row) in rows {
        let slots = agent.tables.range(row);
        for slot in &slots {
            let backend = (row.id, slot.addr, slot.port);
            if *backends_by_id.entry(slot.id).or_insert(backend) != backend {
                return Err(format!("id {} belongs to two backends or services", slot.id));
            }
            let generation = agent.tables.generations.row(&slot.id);
            if generation != Some(slot.generation) || slot.generation % 2 == 0 {
                return Err(format!("{slot:?} of {key:?}: the generation of its id is {generation:?}"));
            }
        }
        let ids: Vec<u32> = slots.iter().map(|slot| slot.id).collect();
        if row.flags & ServiceFlags::HASH == 0 && !ids.is_sorted() {
            return Err(format!("{key:?}: slots out of order: {ids:?}"));
        }
    }
    let backends: BTreeSet<_> = backends_by_id.values().collect();
    if backends.len() != backends_by_id.len() {
        return Err(format!("a backend of a service has two ids: {backends_by_id:?}"));
    }
    let unused: Vec<u32> =
        backends_by_id.keys().filter(|id| !agent.tables.ids_in_use().contains(id)).copied().collect();
    if unused.is_empty() { Ok(ranges) } else { Err(format!("ids in ranges that are not in use: {unused:?}")) }
}
