//! Reconciles `SERVICES`, `BACKENDS` and `BACKEND_GENERATIONS`: Service ports to frontends and
//! ranges.
//!
//! Invariants after every single write: a row of `SERVICES` points to a completely written range,
//! which is not written again while the row or a reader of it may exist; every slot of the range
//! has the generation of its backend. Hence the order: IDs of new backends, a new range, the rows
//! that point to it, removed rows, and last the generations of removed backends, which makes their
//! UDP flows select a new backend.

mod apply;
mod audit;
mod backend_index;
mod backends;
mod cluster_range;
mod ids;
mod ranges;
mod source_ranges;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, btree_map::Entry},
    sync::Arc,
    time::Instant,
};

use dataplane_common::abi::{BackendSlot, ClusterRange, Service, ServiceKey};

pub(super) use self::backends::BackendKey;
use self::{
    apply::BackendRange,
    backends::Backends,
    ids::ServiceIds,
    ranges::{RangeError, Ranges},
    source_ranges::SourceRanges,
};
use super::{backoff::WorkQueue, instrumented::InstrumentedTable, slots::SlotsError};
use crate::{
    compile::{
        self,
        services::{PortEntries, ServiceEntries, ServicePortKey},
    },
    datapath::table::{SourcePrefix, Table, TableError},
    state::NamespacedName,
};

/// A key of the work queue.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum ServiceWork {
    Service(NamespacedName),
    /// A frontend that may have no owner.
    Frontend(ServiceKey),
}

/// Desired and actual entries.
#[derive(Debug)]
pub(super) struct Services {
    pub(super) table: InstrumentedTable<ServiceKey, Service>,
    /// Rows as in the table.
    rows: HashMap<ServiceKey, Service>,
    /// Rows this agent did not write as they are, with the first slots of the ranges they use: rows
    /// of an earlier agent with overlapping ranges, and rows changed by another program.
    broken: HashMap<ServiceKey, Vec<u32>>,
    pub(super) ranges: Ranges,
    pub(super) backends: Backends,
    pub(super) source_ranges: SourceRanges,
    ids: ServiceIds,
    desired: BTreeMap<NamespacedName, Arc<ServiceEntries>>,
    /// The owner of each frontend: the first port that wanted it.
    owners: HashMap<ServiceKey, ServicePortKey>,
    /// Other ports that want a frontend, in order of arrival.
    waiting: BTreeMap<ServiceKey, Vec<ServicePortKey>>,
    /// Number of owned frontends that are node ports.
    node_ports: usize,
    /// Number of node port and host port frontends, by port of the host.
    host_ports: BTreeMap<u16, usize>,
    pub(super) host_ports_changed: bool,
    /// Prefixes that contain all cluster IPs, by family.
    cluster_ranges: [Option<ClusterRange>; 2],
    /// All objects were delivered. Until then, a Service without backends may get its slices later,
    /// and keeps the backends an earlier agent wrote.
    synced: bool,
    /// Services that keep such backends.
    awaiting_slices: BTreeSet<NamespacedName>,
    pub(super) queue: WorkQueue<ServiceWork>,
}

impl Services {
    pub(super) fn new(
        services: Box<dyn Table<ServiceKey, Service>>,
        backends: Box<dyn Table<u32, BackendSlot>>,
        generations: Box<dyn Table<u32, u32>>,
        source_ranges: Box<dyn Table<SourcePrefix, u32>>,
    ) -> Self {
        Self {
            table: InstrumentedTable::new(services),
            rows: HashMap::new(),
            broken: HashMap::new(),
            ranges: Ranges::new(backends),
            backends: Backends::new(generations),
            source_ranges: SourceRanges::new(source_ranges),
            ids: ServiceIds::default(),
            desired: BTreeMap::new(),
            owners: HashMap::new(),
            waiting: BTreeMap::new(),
            node_ports: 0,
            host_ports: BTreeMap::new(),
            host_ports_changed: false,
            cluster_ranges: [None; 2],
            synced: false,
            awaiting_slices: BTreeSet::new(),
            queue: WorkQueue::default(),
        }
    }

    /// Adopts existing rows. Returns the number of frontends, backends and broken rows.
    pub(super) fn adopt(&mut self) -> Result<(usize, usize, usize), TableError> {
        let mut rows = self.table.entries()?;
        // of two overlapping ranges, the smaller is more likely intact, and leaves less to keep
        rows.sort_by_key(|(key, row)| (row.count, row.first_slot, *key));
        for (key, value) in rows {
            let (ranges, own) = self.ranges.adopt(&value, key.protocol, &mut self.backends)?;
            if !own || !value.is_intact(&key) {
                self.broken.insert(key, ranges);
            }
            self.rows.insert(key, value);
        }
        self.backends.finish_adoption();
        self.ranges.finish_adoption(&self.backends);
        self.source_ranges.adopt()?;
        self.ids.adopt(self.rows.values().map(|row| row.id));
        Ok((self.rows.len(), self.backends.used(), self.broken.len()))
    }

    /// Sets the desired entries of a Service; `None`: it was removed.
    pub(super) fn set(&mut self, name: &NamespacedName, entries: Option<ServiceEntries>) {
        let before = self.desired.get(name).cloned();
        if before.as_deref() == entries.as_ref() {
            return;
        }
        let frontends_after = frontends_of(entries.as_ref());
        let frontends_before = frontends_of(before.as_deref());
        for (frontend, port) in frontends_before.difference(&frontends_after) {
            self.release(frontend, port);
        }
        for (frontend, port) in frontends_after.difference(&frontends_before) {
            self.acquire(frontend, port);
        }
        for (key, _) in frontends_after.difference(&frontends_before) {
            if *key == ServiceKey::of_address(key.addr) {
                let range = &mut self.cluster_ranges[usize::from(!key.addr.is_v4())];
                *range = Some(cluster_range::widened(*range, key.addr));
            }
        }
        let served = self.serving_keys(before.as_deref());
        let ports = entries.iter().flat_map(|entries| &entries.ports).map(|port| &port.key);
        let ports: HashSet<_> = ports.collect();
        for port in before.iter().flat_map(|before| &before.ports) {
            if !ports.contains(&port.key) {
                if let Some(id) = self.ids.get(&port.key)
                    && let Err(error) = self.source_ranges.restrict(id, &[])
                {
                    tracing::warn!(%error, "cannot remove source ranges of deleted Service");
                }
                self.ids.release(&port.key);
            }
        }
        // a new port gets its ID when it is applied
        let serving = self.serving_keys(entries.as_ref());
        self.backends.add_serving(serving.difference(&served));
        self.backends.remove_serving(served.difference(&serving));
        match entries {
            Some(entries) => self.desired.insert(name.clone(), Arc::new(entries)),
            None => self.desired.remove(name),
        };
        self.queue.push(ServiceWork::Service(name.clone()));
    }

    /// Backends whose UDP flows continue.
    fn serving_keys(&self, entries: Option<&ServiceEntries>) -> BTreeSet<BackendKey> {
        let ports = entries.into_iter().flat_map(|entries| &entries.ports);
        let with_ids = ports.filter_map(|port| Some((port, self.ids.get(&port.key)?)));
        with_ids.flat_map(|(port, id)| serving_keys(port, id)).collect()
    }

    /// Whether the Service has desired entries.
    pub(super) fn is_known(&self, name: &NamespacedName) -> bool {
        self.desired.contains_key(name)
    }

    fn acquire(&mut self, frontend: &ServiceKey, port: &ServicePortKey) {
        if self.owners.contains_key(frontend) {
            return self.waiting.entry(*frontend).or_default().push(port.clone());
        }
        self.owners.insert(*frontend, port.clone());
        if is_node_port(frontend) {
            self.node_ports += 1;
        }
        if is_host_port(frontend, port) {
            let frontends = self.host_ports.entry(frontend.port.get()).or_insert(0);
            self.host_ports_changed |= *frontends == 0;
            *frontends += 1;
        }
    }

    /// Passes the frontend to the next waiting port, or removes it after other changes.
    fn release(&mut self, frontend: &ServiceKey, port: &ServicePortKey) {
        let waiting = self.waiting.get_mut(frontend);
        if self.owners.get(frontend) != Some(port) {
            if let Some(waiting) = waiting {
                waiting.retain(|other| other != port);
            }
        } else if let Some(waiting) = waiting {
            let next = waiting.remove(0);
            self.queue.push(ServiceWork::Service(next.service.clone()));
            self.owners.insert(*frontend, next);
        } else {
            self.owners.remove(frontend);
            if is_node_port(frontend) {
                self.node_ports -= 1;
            }
            if is_host_port(frontend, port) {
                self.release_host_port(frontend.port.get());
            }
            self.queue.push(ServiceWork::Frontend(*frontend));
        }
        if self.waiting.get(frontend).is_some_and(Vec::is_empty) {
            self.waiting.remove(frontend);
        }
    }

    fn release_host_port(&mut self, port: u16) {
        let Entry::Occupied(mut frontends) = self.host_ports.entry(port) else { return };
        *frontends.get_mut() -= 1;
        if *frontends.get() == 0 {
            frontends.remove();
            self.host_ports_changed = true;
        }
    }

    /// Frontends that several Services want: the owner, and the first waiting one.
    pub(super) fn conflicts(&self) -> impl Iterator<Item = (&ServiceKey, &NamespacedName, &NamespacedName)> {
        // Services may share an external address, with different ports
        let frontends =
            self.waiting.iter().filter(|(frontend, _)| **frontend != ServiceKey::of_ping(frontend.addr));
        frontends.filter_map(|(frontend, waiting)| {
            let (owner, first) = (self.owners.get(frontend)?, waiting.first()?);
            Some((frontend, &owner.service, &first.service))
        })
    }

    /// Removes frontends without an owner and backends without a range.
    pub(super) fn sweep(&mut self) {
        for key in self.rows.keys() {
            if !self.owners.contains_key(key) {
                self.queue.push(ServiceWork::Frontend(*key));
            }
        }
        self.backends.sweep();
        // a source range that cannot be removed has no effect: no row has the ID
        let ids: HashSet<u32> = self.rows.values().map(|row| row.id).collect();
        if let Err(error) = self.source_ranges.sweep(&ids) {
            tracing::warn!(%error, "cannot remove source ranges of deleted Services");
        }
    }

    /// All objects were delivered: a Service without slices has no backends.
    pub(super) fn on_synced(&mut self) {
        self.synced = true;
        for name in std::mem::take(&mut self.awaiting_slices) {
            self.queue.push(ServiceWork::Service(name));
        }
    }

    /// Reconciles one due key. Returns `false` if there is none.
    pub(super) fn work_one(&mut self, now: Instant) -> bool {
        let Some(work) = self.queue.pop(now) else { return self.backends.work_one(now) };
        self.reconcile_key(work, now);
        true
    }

    /// Like [`Self::set`], but writes the rows before it returns. Failures are retried by later
    /// work.
    pub(super) fn set_now(&mut self, name: &NamespacedName, entries: Option<ServiceEntries>, now: Instant) {
        let frontends = |services: &Self| -> BTreeSet<ServiceKey> {
            frontends_of(services.desired.get(name).map(Arc::as_ref))
                .into_iter()
                .map(|(key, _)| key)
                .collect()
        };
        let before = frontends(self);
        self.set(name, entries);
        self.reconcile_key(ServiceWork::Service(name.clone()), now);
        for removed in before.difference(&frontends(self)) {
            self.reconcile_key(ServiceWork::Frontend(*removed), now);
        }
    }

    fn reconcile_key(&mut self, work: ServiceWork, now: Instant) {
        let result = match &work {
            ServiceWork::Service(name) => self.apply(name, now),
            ServiceWork::Frontend(key) => self.remove_unowned(key, now).map_err(RangeError::from),
        };
        match result {
            Ok(()) => self.queue.done(&work),
            Err(RangeError::Slots(error @ SlotsError::Quarantined { until, .. })) => {
                self.queue.postpone(work, error.to_string(), until);
            }
            Err(error) => self.queue.fail(work, error.to_string(), now),
        }
    }

    /// Runs a step of background work.
    pub(super) fn scan_step(&mut self) {
        self.backends.scan_step();
    }

    /// The desired entries of each Service.
    pub(super) fn desired(&self) -> impl Iterator<Item = &ServiceEntries> {
        self.desired.values().map(Arc::as_ref)
    }

    /// The ID of a port, once allocated.
    pub(super) fn id(&self, port: &ServicePortKey) -> Option<u32> {
        self.ids.get(port)
    }

    /// The row of a frontend and its backends.
    pub(super) fn row(&self, frontend: &ServiceKey) -> Option<(&Service, Vec<BackendKey>)> {
        let row = self.rows.get(frontend)?;
        let ranges = self.ranges_of(frontend, row).into_iter();
        let members = ranges.flat_map(|start| self.ranges.members(start));
        Some((row, members.filter_map(|id| self.backends.key(id)).copied().collect()))
    }

    /// First slots of the ranges a row uses: none without backends, several if the row is broken.
    fn ranges_of(&self, frontend: &ServiceKey, row: &Service) -> Vec<u32> {
        match self.broken.get(frontend) {
            Some(ranges) => ranges.clone(),
            None => BackendRange::of(row).first_slot().into_iter().collect(),
        }
    }

    /// Prefixes that contain all cluster IPs seen so far, IPv4 and IPv6.
    pub(super) fn cluster_ranges(&self) -> [ClusterRange; 2] {
        self.cluster_ranges.map(|range| range.unwrap_or(ClusterRange::EMPTY))
    }

    pub(super) const fn has_node_ports(&self) -> bool {
        self.node_ports > 0
    }

    /// Ports of the host that belong to pods or Services.
    pub(super) fn host_ports(&self) -> impl Iterator<Item = u16> {
        self.host_ports.keys().copied()
    }

    pub(super) fn used(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        [self.queue.next_due(now), self.backends.next_due(now)].into_iter().flatten().min()
    }

    pub(super) fn is_settled(&self) -> bool {
        self.queue.is_settled() && self.backends.queue.is_settled()
    }

    pub(super) const fn changes(&self) -> u64 {
        self.table.changes()
            + self.ranges.table.changes()
            + self.backends.table.changes()
            + self.source_ranges.table.changes()
    }
}

/// Whether the frontend is a node port.
fn is_node_port(frontend: &ServiceKey) -> bool {
    *frontend == frontend.at_node()
}

/// Whether the frontend is a port that a socket of the host could also bind.
fn is_host_port(frontend: &ServiceKey, port: &ServicePortKey) -> bool {
    is_node_port(frontend) || compile::host_ports::is_host_ports_name(&port.service)
}

/// Backends of a port whose UDP flows continue.
fn serving_keys(port: &PortEntries, service: u32) -> impl Iterator<Item = BackendKey> + '_ {
    let protocol = port.key.protocol.number();
    port.serving_udp.iter().map(move |it| BackendKey { service, addr: it.addr, port: it.port, protocol })
}

fn frontends_of(entries: Option<&ServiceEntries>) -> BTreeSet<(ServiceKey, ServicePortKey)> {
    let ports = entries.into_iter().flat_map(|entries| &entries.ports);
    ports.flat_map(|port| port.frontends().map(|key| (*key, port.key.clone()))).collect()
}
