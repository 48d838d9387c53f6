//! `SERVICES`, `BACKENDS`, `BACKEND_GENERATIONS` and `SOURCE_RANGES`, each row with what it leads
//! to.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use dataplane_agent::{
    compile::routes::network,
    datapath::table::{RoutePrefix, Table},
    reconcile::SocketUpdate,
};
use dataplane_common::{
    abi::{Addr, BackendSlot, Scope, Service, ServiceFlags, ServiceKey},
    net::Protocol,
};

use super::{by_family, flag_names};
use crate::golden::{node::Node, text::TextTable};

const FLAGS: [(u32, &str); 8] = [
    (ServiceFlags::HASH, "hash"),
    (ServiceFlags::OUTSIDE, "outside"),
    (ServiceFlags::SOURCE_RANGES, "source_ranges"),
    (ServiceFlags::LOCAL, "local"),
    (ServiceFlags::HOST_PORT, "host_port"),
    (ServiceFlags::DSR, "dsr"),
    (ServiceFlags::HOST_BACKEND, "host_backend"),
    (ServiceFlags::READY, "ready"),
];

/// A backend as the dump numbers it: sorted by address, port and protocol.
type BackendKey = ((bool, std::net::IpAddr), u16, u8);

/// The rows of the four tables.
#[derive(Debug)]
pub(super) struct Services {
    /// Sorted as they are shown.
    rows: Vec<(ServiceKey, Service)>,
    slots: BTreeMap<u32, BackendSlot>,
    generations: BTreeMap<u32, u32>,
    /// Service and port of each service ID, or the name of the Service for its addresses.
    names: BTreeMap<u32, String>,
    /// Number of each backend in the dump, and its ID.
    numbers: BTreeMap<BackendKey, (usize, u32)>,
    ranges: Vec<(String, String)>,
    /// UDP backends by service ID, in a range or not.
    udp: BTreeSet<(u32, BackendKey, String)>,
}

impl Services {
    pub(super) fn read(node: &Node) -> Result<Self> {
        let mut names = BTreeMap::new();
        for port in node.reconciler.services(&node.store) {
            let name = format!("{}/{} {}/{}", port.namespace, port.name, port.port, port.protocol);
            names.insert(port.id, name);
        }
        let mut rows = node.tables.services.entries()?;
        for (key, row) in rows.iter().filter(|(key, _)| key.port.get() == 0) {
            let ip = key.addr.to_ip();
            let has = |service: &&dataplane_agent::state::Service| {
                let external = service.external_ips.iter().chain(&service.load_balancer_ips);
                service.cluster_ips.contains(&ip) || external.clone().any(|it| *it == ip)
            };
            if let Some(service) = node.store.services().find(has) {
                names.insert(row.id, service.name.to_string());
            }
        }
        rows.sort_by_key(|(key, row)| {
            let is_node_port = *key == key.at_node();
            let name = names.get(&row.id).cloned();
            (name, is_node_port, by_family(key.addr), key.port.get(), key.protocol, key.scope)
        });
        let mut services = Self {
            rows,
            slots: node.tables.backends.entries()?.into_iter().collect(),
            generations: node.tables.generations.entries()?.into_iter().collect(),
            names,
            numbers: BTreeMap::new(),
            ranges: Vec::new(),
            udp: BTreeSet::new(),
        };
        services.number_backends();
        services.ranges = services.read_ranges(node)?;
        if let SocketUpdate::AllBackends(backends) = node.reconciler.udp_backends() {
            let udp = backends.into_iter().filter(|it| it.service != 0).map(|it| {
                let key = (by_family(it.addr), it.port.get(), Protocol::UDP);
                (it.service, key, endpoint(it.addr, it.port.get()))
            });
            services.udp = udp.collect();
        }
        Ok(services)
    }

    fn number_backends(&mut self) {
        for (key, row) in &self.rows {
            for slot in self.slots_of(row) {
                let backend = (by_family(slot.addr), slot.port.get(), key.protocol);
                self.numbers.insert(backend, (0, slot.id));
            }
        }
        for (number, (position, _)) in self.numbers.values_mut().enumerate() {
            *position = number + 1;
        }
    }

    fn slots_of(&self, row: &Service) -> Vec<BackendSlot> {
        let slots = row.first_slot..row.first_slot + row.count;
        slots.map(|slot| self.slots.get(&slot).copied().unwrap_or_default()).collect()
    }

    fn name(&self, id: u32) -> String {
        self.names.get(&id).cloned().unwrap_or_else(|| format!("UNKNOWN ID {id}"))
    }

    /// Rows of `SERVICES` with the backends of their range.
    pub(super) fn frontends(&self) -> TextTable {
        const COLUMNS: [&str; 8] =
            ["service port", "frontend", "clients", "flags", "affinity", "range", "slots", "backends"];
        let mut table = TextTable::new("SERVICES", &COLUMNS);
        let mut ranges: Vec<u32> = Vec::new();
        for (key, row) in &self.rows {
            let range = if row.count == 0 {
                String::new()
            } else {
                let known = ranges.iter().position(|first| *first == row.first_slot);
                let index = known.unwrap_or_else(|| {
                    ranges.push(row.first_slot);
                    ranges.len() - 1
                });
                format!("r{}", index + 1)
            };
            let is_address =
                *key == ServiceKey::of_address(key.addr) || *key == ServiceKey::of_ping(key.addr);
            table.row([
                self.name(row.id),
                if is_address { format!("{} (address)", key.addr) } else { frontend(key) },
                if key.scope == Scope::Outside as u8 { "outside" } else { "any" }.to_owned(),
                flag_names(row.flags, &FLAGS),
                if row.affinity_timeout == 0 { String::new() } else { format!("{}s", row.affinity_timeout) },
                range,
                row.count.to_string(),
                self.backends_of(key, row),
            ]);
        }
        table
    }

    /// The backends of a row, sorted; of a Maglev table with their shares and a hash of its order.
    fn backends_of(&self, key: &ServiceKey, row: &Service) -> String {
        let mut shares: BTreeMap<BackendKey, (usize, String)> = BTreeMap::new();
        let mut hash = FNV_BASIS;
        for slot in self.slots_of(row) {
            let text = endpoint(slot.addr, slot.port.get());
            hash = text.bytes().fold(hash, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(FNV_PRIME));
            let backend = (by_family(slot.addr), slot.port.get(), key.protocol);
            shares.entry(backend).or_insert((0, text)).0 += 1;
        }
        let is_maglev = row.flags & ServiceFlags::HASH != 0;
        let text = |(key, (share, text)): (&BackendKey, &(usize, String))| {
            let number = self.numbers.get(key).map_or(0, |(number, _)| *number);
            let share = if is_maglev || *share > 1 { format!(" x{share}") } else { String::new() };
            format!("{text} #{number}{share}")
        };
        let order = (is_maglev && row.count > 0).then(|| format!("order {hash:08x}"));
        shares.iter().map(text).chain(order).collect::<Vec<_>>().join(", ")
    }

    /// Backends with an ID, in a range or not: each has a generation that is in use.
    pub(super) fn backends(&self) -> TextTable {
        const COLUMNS: [&str; 4] = ["number", "backend", "protocol", "in ranges"];
        let mut table = TextTable::new("BACKENDS", &COLUMNS);
        let mut ranges: BTreeMap<BackendKey, BTreeSet<u32>> = BTreeMap::new();
        for (key, row) in &self.rows {
            for slot in self.slots_of(row) {
                let backend = (by_family(slot.addr), slot.port.get(), key.protocol);
                ranges.entry(backend).or_default().insert(row.first_slot);
            }
        }
        for (key, (number, _)) in &self.numbers {
            let ((_, ip), port, protocol) = key;
            table.row([
                format!("#{number}"),
                endpoint((*ip).into(), *port),
                Protocol::name(*protocol).to_owned(),
                ranges.get(key).map_or(0, BTreeSet::len).to_string(),
            ]);
        }
        let without_range: BTreeSet<_> = self
            .udp
            .iter()
            .map(|(_, key, text)| (key, text))
            .filter(|(key, _)| !self.numbers.contains_key(key))
            .collect();
        for (_, text) in without_range {
            table.row([String::new(), text.clone(), "UDP".to_owned(), "0".to_owned()]);
        }
        table
    }

    fn read_ranges(&self, node: &Node) -> Result<Vec<(String, String)>> {
        let mut ranges = Vec::new();
        for (prefix, _) in node.tables.source_ranges.entries()? {
            let bits = prefix.bits.saturating_sub(u32::BITS);
            let clients = network(&RoutePrefix { addr: prefix.range.addr, bits });
            let clients = clients.map_or_else(|| format!("{prefix:?}"), |clients| clients.to_string());
            ranges.push((by_family(prefix.range.addr), self.name(prefix.range.service_id), clients));
        }
        ranges.sort_by(|a, b| (&a.1, a.0, &a.2).cmp(&(&b.1, b.0, &b.2)));
        Ok(ranges.into_iter().map(|(_, name, clients)| (name, clients)).collect())
    }

    pub(super) fn source_ranges(&self) -> TextTable {
        let mut table = TextTable::new("SOURCE_RANGES", &["service port", "clients"]);
        for (name, clients) in &self.ranges {
            table.row([name.clone(), clients.clone()]);
        }
        table
    }

    /// Rows that the datapath would not use as intended.
    pub(super) fn wrong(&self) -> TextTable {
        let mut table = TextTable::new("WRONG ROWS", &["row", "what is wrong"]);
        for (key, row) in &self.rows {
            let mut add = |what: String| table.row([frontend(key), what]);
            if !row.is_intact(key) {
                add("row checksum".to_owned());
            }
            let slots = self.slots_of(row);
            if row.flags & ServiceFlags::HASH == 0 && !slots.is_sorted_by_key(|slot| slot.id) {
                add("slots are not sorted by ID".to_owned());
            }
            for slot in slots {
                let generation = self.generations.get(&slot.id).copied().unwrap_or(0);
                if generation % 2 == 0 || slot.generation != generation {
                    add(format!("generation of {}", endpoint(slot.addr, slot.port.get())));
                }
            }
        }
        let in_use = self.generations.values().filter(|generation| *generation % 2 == 1).count();
        let (mut ids, mut in_ranges) = (BTreeSet::new(), BTreeSet::new());
        for (key, row) in &self.rows {
            for slot in self.slots_of(row) {
                ids.insert(slot.id);
                in_ranges.insert((row.id, (by_family(slot.addr), slot.port.get(), key.protocol)));
            }
        }
        let without_range = self.udp.iter().filter(|(id, key, _)| !in_ranges.contains(&(*id, *key))).count();
        let known = ids.len() + without_range;
        if in_use != known {
            let what = format!("{in_use} IDs are in use, for {known} backends");
            table.row(["BACKEND_GENERATIONS".to_owned(), what]);
        }
        table
    }
}

/// FNV-1a: only has to differ when the order differs.
const FNV_BASIS: u32 = 0x811c_9dc5;
const FNV_PRIME: u32 = 0x0100_0193;

fn endpoint(addr: Addr, port: u16) -> String {
    std::net::SocketAddr::new(addr.to_ip(), port).to_string()
}

fn frontend(key: &ServiceKey) -> String {
    format!("{}/{}", endpoint(key.addr, key.port.get()), Protocol::name(key.protocol))
}
