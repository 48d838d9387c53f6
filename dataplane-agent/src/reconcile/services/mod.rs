//! `SERVICES`, `BACKENDS` and `BACKEND_GENERATIONS`: from ports of services to frontends and ranges.
//!
//! Invariants, after every single write: a row of `SERVICES` points to a range that is written completely and is not
//! written again while the row or a reader of it may be there; every slot of such a range carries the generation its
//! backend has. So the order is: numbers of new backends, a fresh range, the rows that point to it, what is not wanted any
//! more, and last the generations of backends that are gone, which makes UDP flows to them choose again.

mod apply;
mod audit;
mod backends;
mod cluster_range;
mod ids;
mod numbers;
mod ranges;
mod sources;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, btree_map::Entry},
    sync::Arc,
    time::Instant,
};

use dataplane_common::abi::{BackendSlot, ClusterRange, Service, ServiceKey};

pub(super) use self::backends::BackendKey;
use self::{
    apply::Backing,
    backends::Backends,
    ids::ServiceIds,
    ranges::{RangeError, Ranges},
    sources::Sources,
};
use super::{backoff::WorkQueue, instrumented::InstrumentedTable, slots::SlotsError};
use crate::{
    compile::{
        self,
        services::{ServiceEntries, ServicePortKey},
    },
    datapath::table::{SourcePrefix, Table, TableError},
    state::NamespacedName,
};

/// What is worked on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum ServiceWork {
    Service(NamespacedName),
    /// One that nobody may want any more.
    Frontend(ServiceKey),
}

/// Wanted and actual entries.
#[derive(Debug)]
pub(super) struct Services {
    pub(super) table: InstrumentedTable<ServiceKey, Service>,
    /// Rows as they are in the table.
    rows: HashMap<ServiceKey, Service>,
    /// Rows that are not as this agent would write them, by the first slots of the ranges they hold: those of an earlier
    /// agent whose range is not theirs alone, and those that somebody changed.
    broken: HashMap<ServiceKey, Vec<u32>>,
    pub(super) ranges: Ranges,
    pub(super) backends: Backends,
    pub(super) sources: Sources,
    ids: ServiceIds,
    wanted: BTreeMap<NamespacedName, Arc<ServiceEntries>>,
    /// Who has a frontend: the first that wanted it.
    holders: HashMap<ServiceKey, ServicePortKey>,
    /// Others that want it, in the order they came.
    waiting: BTreeMap<ServiceKey, Vec<ServicePortKey>>,
    /// Frontends among them that are node ports.
    node_ports: usize,
    /// How many of them are node ports or lead to pods of this node, by port of the host.
    host_ports: BTreeMap<u16, usize>,
    pub(super) host_ports_changed: bool,
    /// Prefixes that hold all cluster IPs, of either family.
    cluster_ranges: [Option<ClusterRange>; 2],
    /// Everything that exists has been heard of. Until then a service without backends is one whose slices come later,
    /// and keeps those an earlier agent gave it.
    complete: bool,
    /// Services that kept theirs.
    early: BTreeSet<NamespacedName>,
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
            sources: Sources::new(source_ranges),
            ids: ServiceIds::default(),
            wanted: BTreeMap::new(),
            holders: HashMap::new(),
            waiting: BTreeMap::new(),
            node_ports: 0,
            host_ports: BTreeMap::new(),
            host_ports_changed: false,
            cluster_ranges: [None; 2],
            complete: false,
            early: BTreeSet::new(),
            queue: WorkQueue::default(),
        }
    }

    /// Takes over what is there. Returns how many frontends, backends and broken rows there are.
    pub(super) fn adopt(&mut self) -> Result<(usize, usize, usize), TableError> {
        let mut rows = self.table.entries()?;
        // of two that overlap, the small one is the more likely to be right, and the rest is less to hold
        rows.sort_by_key(|(key, row)| (row.count, row.first_slot, *key));
        for (key, value) in rows {
            let (ranges, own) = self.ranges.adopt(&value, key.protocol, &mut self.backends)?;
            if !own || !value.is_intact(&key) {
                self.broken.insert(key, ranges);
            }
            self.rows.insert(key, value);
        }
        self.backends.adopted();
        self.sources.adopt()?;
        self.ids.adopt(self.rows.values().map(|row| row.id));
        Ok((self.rows.len(), self.backends.used(), self.broken.len()))
    }

    /// What a service should be; `None`: it is gone.
    pub(super) fn set(&mut self, name: &NamespacedName, entries: Option<ServiceEntries>) {
        let before = self.wanted.get(name).cloned();
        if before.as_deref() == entries.as_ref() {
            return;
        }
        let claims_after = claims_of(entries.as_ref());
        let claims_before = claims_of(before.as_deref());
        for (frontend, port) in claims_before.difference(&claims_after) {
            self.unclaim(frontend, port);
        }
        for (frontend, port) in claims_after.difference(&claims_before) {
            self.claim(frontend, port);
        }
        for (key, _) in claims_after.difference(&claims_before) {
            if *key == ServiceKey::of_address(key.addr) {
                let range = &mut self.cluster_ranges[usize::from(!key.addr.is_v4())];
                *range = Some(cluster_range::widened(*range, key.addr));
            }
        }
        let (serve, served) = (serving(entries.as_ref()), serving(before.as_deref()));
        self.backends.keep(serve.difference(&served));
        self.backends.let_go(served.difference(&serve));
        let ports = entries.iter().flat_map(|entries| &entries.ports).map(|port| &port.key);
        let ports: HashSet<_> = ports.collect();
        for port in before.iter().flat_map(|before| &before.ports) {
            if !ports.contains(&port.key) {
                if let Some(id) = self.ids.get(&port.key)
                    && let Err(error) = self.sources.restrict(id, &[])
                {
                    tracing::warn!(%error, "remove source ranges of a service that is gone");
                }
                self.ids.forget(&port.key);
            }
        }
        match entries {
            Some(entries) => self.wanted.insert(name.clone(), Arc::new(entries)),
            None => self.wanted.remove(name),
        };
        self.queue.push(ServiceWork::Service(name.clone()));
    }

    /// Whether it has been said what the service should be.
    pub(super) fn is_known(&self, name: &NamespacedName) -> bool {
        self.wanted.contains_key(name)
    }

    fn claim(&mut self, frontend: &ServiceKey, port: &ServicePortKey) {
        if self.holders.contains_key(frontend) {
            return self.waiting.entry(*frontend).or_default().push(port.clone());
        }
        self.holders.insert(*frontend, port.clone());
        if is_node_port(frontend) {
            self.node_ports += 1;
        }
        if is_host_port(frontend, port) {
            let frontends = self.host_ports.entry(frontend.port.get()).or_insert(0);
            self.host_ports_changed |= *frontends == 0;
            *frontends += 1;
        }
    }

    /// The next in line gets the frontend, or it goes: after what else has changed is in place.
    fn unclaim(&mut self, frontend: &ServiceKey, port: &ServicePortKey) {
        let waiting = self.waiting.get_mut(frontend);
        if self.holders.get(frontend) != Some(port) {
            if let Some(waiting) = waiting {
                waiting.retain(|other| other != port);
            }
        } else if let Some(waiting) = waiting {
            let next = waiting.remove(0);
            self.queue.push(ServiceWork::Service(next.service.clone()));
            self.holders.insert(*frontend, next);
        } else {
            self.holders.remove(frontend);
            if is_node_port(frontend) {
                self.node_ports -= 1;
            }
            if is_host_port(frontend, port) {
                self.leave_host_port(frontend.port.get());
            }
            self.queue.push(ServiceWork::Frontend(*frontend));
        }
        if self.waiting.get(frontend).is_some_and(Vec::is_empty) {
            self.waiting.remove(frontend);
        }
    }

    fn leave_host_port(&mut self, port: u16) {
        let Entry::Occupied(mut frontends) = self.host_ports.entry(port) else { return };
        *frontends.get_mut() -= 1;
        if *frontends.get() == 0 {
            frontends.remove();
            self.host_ports_changed = true;
        }
    }

    /// Frontends several services want: the one that has it, and the first that does not.
    pub(super) fn conflicts(&self) -> impl Iterator<Item = (&ServiceKey, &NamespacedName, &NamespacedName)> {
        self.waiting.iter().filter_map(|(frontend, waiting)| {
            let (holder, first) = (self.holders.get(frontend)?, waiting.first()?);
            Some((frontend, &holder.service, &first.service))
        })
    }

    /// Frontends nobody wants do not exist, nor do backends no range has.
    pub(super) fn sweep(&mut self) {
        for key in self.rows.keys() {
            if !self.holders.contains_key(key) {
                self.queue.push(ServiceWork::Frontend(*key));
            }
        }
        self.backends.sweep();
        // a range that cannot be removed lets nobody in: no row has the number
        let ids: HashSet<u32> = self.rows.values().map(|row| row.id).collect();
        if let Err(error) = self.sources.sweep(&ids) {
            tracing::warn!(%error, "remove source ranges of services that are gone");
        }
    }

    /// Everything that exists has been heard of: a service without backends has none.
    pub(super) fn complete(&mut self) {
        self.complete = true;
        for name in std::mem::take(&mut self.early) {
            self.queue.push(ServiceWork::Service(name));
        }
    }

    /// Works on one key that is due. `false`: there is none.
    pub(super) fn work_one(&mut self, now: Instant) -> bool {
        let Some(work) = self.queue.pop(now) else { return self.backends.work_one(now) };
        self.work_on(work, now);
        true
    }

    /// As [`Self::set`], and in the tables when it returns, whatever else waits. What fails is tried again by later work.
    pub(super) fn set_now(&mut self, name: &NamespacedName, entries: Option<ServiceEntries>, now: Instant) {
        let frontends = |services: &Self| -> BTreeSet<ServiceKey> {
            claims_of(services.wanted.get(name).map(Arc::as_ref)).into_iter().map(|(key, _)| key).collect()
        };
        let before = frontends(self);
        self.set(name, entries);
        self.work_on(ServiceWork::Service(name.clone()), now);
        for gone in before.difference(&frontends(self)) {
            self.work_on(ServiceWork::Frontend(*gone), now);
        }
    }

    fn work_on(&mut self, work: ServiceWork, now: Instant) {
        let done = match &work {
            ServiceWork::Service(name) => self.apply(name, now),
            ServiceWork::Frontend(key) => self.drop_unclaimed(key, now).map_err(RangeError::from),
        };
        match done {
            Ok(()) => self.queue.settle(&work),
            Err(RangeError::Slots(error @ SlotsError::Resting { until, .. })) => {
                self.queue.postpone(work, error.to_string(), until);
            }
            Err(error) => self.queue.fail(work, error.to_string(), now),
        }
    }

    /// A step of what nobody waits for.
    pub(super) fn look(&mut self) {
        self.backends.look();
    }

    /// What is wanted of each service.
    pub(super) fn wanted(&self) -> impl Iterator<Item = &ServiceEntries> {
        self.wanted.values().map(Arc::as_ref)
    }

    /// The number of a port, once it is known.
    pub(super) fn id(&self, port: &ServicePortKey) -> Option<u32> {
        self.ids.get(port)
    }

    /// The row of a frontend, and the backends it leads to.
    pub(super) fn row(&self, frontend: &ServiceKey) -> Option<(&Service, Vec<BackendKey>)> {
        let row = self.rows.get(frontend)?;
        let ranges = self.ranges_of(frontend, row).into_iter();
        let members = ranges.flat_map(|start| self.ranges.members(start));
        Some((row, members.filter_map(|id| self.backends.key(id)).copied().collect()))
    }

    /// First slots of the ranges a row holds: one, none without backends, several if it is broken.
    fn ranges_of(&self, frontend: &ServiceKey, row: &Service) -> Vec<u32> {
        match self.broken.get(frontend) {
            Some(ranges) => ranges.clone(),
            None => Backing::of(row).range().into_iter().collect(),
        }
    }

    /// Prefixes that hold all cluster IPs there ever were, IPv4 and IPv6.
    pub(super) fn cluster_ranges(&self) -> [ClusterRange; 2] {
        self.cluster_ranges.map(|range| range.unwrap_or(ClusterRange::EMPTY))
    }

    pub(super) const fn has_node_ports(&self) -> bool {
        self.node_ports > 0
    }

    /// Ports of the host that lead to pods or services.
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
            + self.sources.table.changes()
    }
}

/// Whether it is at every address of the node.
fn is_node_port(frontend: &ServiceKey) -> bool {
    *frontend == frontend.at_node()
}

/// Whether it is a port the host's own sockets could have.
fn is_host_port(frontend: &ServiceKey, port: &ServicePortKey) -> bool {
    is_node_port(frontend) || compile::host_ports::is_of_pod(&port.service)
}

/// Backends that conversations may go on with.
fn serving(entries: Option<&ServiceEntries>) -> BTreeSet<BackendKey> {
    let ports = entries.into_iter().flat_map(|entries| &entries.ports);
    let keys = ports.flat_map(|port| {
        let protocol = port.key.protocol.number();
        port.serving.iter().map(move |it| BackendKey { addr: it.addr, port: it.port, protocol })
    });
    keys.collect()
}

fn claims_of(entries: Option<&ServiceEntries>) -> BTreeSet<(ServiceKey, ServicePortKey)> {
    let ports = entries.into_iter().flat_map(|entries| &entries.ports);
    ports.flat_map(|port| port.frontends().map(|key| (*key, port.key.clone()))).collect()
}
