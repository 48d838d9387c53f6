//! Applies one Service: writes its ranges and frontends in the order that readers need.

use std::time::Instant;

use dataplane_common::abi::{Scope, Service, ServiceFlags, ServiceKey};

use super::{BackendKey, ServiceWork, Services, ranges::RangeError};
use crate::{
    compile::services::{Backend, Frontend, PortEntries, ServicePortKey},
    datapath::table::TableError,
    reconcile::slots::SlotsError,
    state::NamespacedName,
};

/// The backend range of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BackendRange {
    /// No backend is ready.
    Empty,
    /// A range, by its first slot.
    Slots(u32),
}

impl BackendRange {
    /// The range of an intact row.
    pub(super) const fn of(row: &Service) -> Self {
        if row.count == 0 { Self::Empty } else { Self::Slots(row.first_slot) }
    }

    pub(super) const fn first_slot(self) -> Option<u32> {
        match self {
            Self::Empty => None,
            Self::Slots(start) => Some(start),
        }
    }
}

impl Services {
    /// Writes the rows of a Service. A port that fails does not stop the others.
    pub(super) fn apply(&mut self, name: &NamespacedName, now: Instant) -> Result<(), RangeError> {
        let Some(entries) = self.desired.get(name).cloned() else { return Ok(()) };
        let mut result = Ok(());
        for port in &entries.ports {
            result = result.and(self.apply_port(name, port, now));
        }
        result
    }

    fn apply_port(
        &mut self,
        name: &NamespacedName,
        port: &PortEntries,
        now: Instant,
    ) -> Result<(), RangeError> {
        let id = self.allocate_id(port);
        // write source ranges before rows that use them; on failure, those rows stay as they are
        let source_ranges_written = self.source_ranges.allow(id, &port.source_ranges);
        let skipped =
            |it: &Frontend| source_ranges_written.is_err() && it.flags & ServiceFlags::SOURCE_RANGES != 0;
        let mut groups = Vec::new();
        for group in &port.groups {
            let own = group.frontends.iter().filter(|it| self.owns(&port.key, &it.key) && !skipped(it));
            let own: Vec<Frontend> = own.copied().collect();
            if !self.synced && self.loses_backends(&own, &group.backends) {
                self.awaiting_slices.insert(name.clone());
            } else {
                groups.push((own, &group.backends));
            }
        }
        let mut result = Ok(());
        // rows for external clients first: the row that refers to them must not exist before
        for scope in [Scope::Outside, Scope::Any] {
            for (frontends, backends) in &groups {
                result = result.and(self.apply_group(port, id, frontends, scope, backends, now));
            }
        }
        source_ranges_written?;
        result?;
        Ok(self.source_ranges.restrict(id, &port.source_ranges)?)
    }

    /// The ID of a port. A new port gets the ID of frontends that it takes over.
    fn allocate_id(&mut self, port: &PortEntries) -> u32 {
        if let Some(id) = self.ids.get(&port.key) {
            return id;
        }
        let found = port.frontends().filter(|key| self.owns(&port.key, key));
        let found: Vec<u32> = found.filter_map(|key| Some(self.rows.get(key)?.id)).collect();
        let id = self.ids.allocate(&port.key, found);
        let serving: Vec<_> = super::serving_keys(port, id).collect();
        self.backends.add_serving(serving.iter());
        id
    }

    /// Whether the port owns the frontend; other ports wait for it.
    fn owns(&self, port: &ServicePortKey, frontend: &ServiceKey) -> bool {
        self.owners.get(frontend) == Some(port)
    }

    /// Whether a frontend of an earlier agent has backends, and is to have none.
    fn loses_backends(&self, frontends: &[Frontend], backends: &[Backend]) -> bool {
        let rows = frontends.iter().filter_map(|it| Some((it, self.rows.get(&it.key)?)));
        rows.into_iter().any(|(frontend, row)| {
            let unready = row.flags & !frontend.flags & ServiceFlags::READY != 0;
            unready || (backends.is_empty() && row.count > 0)
        })
    }

    /// Writes the frontends of one scope. Frontends of a group share a range.
    fn apply_group(
        &mut self,
        port: &PortEntries,
        id: u32,
        frontends: &[Frontend],
        scope: Scope,
        backends: &[Backend],
        now: Instant,
    ) -> Result<(), RangeError> {
        let of_scope: Vec<_> = frontends
            .iter()
            .filter(|it| it.key.scope == scope as u8 && !self.waits_for_external_row(&port.key, it))
            .collect();
        if of_scope.is_empty() {
            return Ok(());
        }
        let protocol = port.key.protocol.number();
        let keys = backends.iter().map(|b| BackendKey { service: id, addr: b.addr, port: b.port, protocol });
        let last = frontends.iter().filter_map(|it| self.rows.get(&it.key)).map(|row| row.generation).max();

        let ids: Option<Vec<u32>> = keys.clone().map(|key| self.backends.id(&key)).collect();
        let content = ids.map(|ids| port.slot_layout(backends, &ids));
        let reusable_range =
            content.and_then(|content| Some((self.reusable_range(frontends, &content)?, content.len())));
        let (range, count, generation) = if let Some((range, count)) = reusable_range {
            (range, count, last.unwrap_or(1))
        } else {
            let ids: Vec<u32> = keys.map(|key| self.backends.allocate(key)).collect::<Result<_, _>>()?;
            let content = port.slot_layout(backends, &ids);
            (self.write_range(&content, now)?, content.len(), last.unwrap_or(0).wrapping_add(1))
        };
        let value = Service {
            id,
            first_slot: range.first_slot().unwrap_or(0),
            count: count as u32,
            affinity_timeout: port.affinity_timeout,
            generation,
            flags: port.flags(),
            // set per row
            checksum: 0,
        };
        let mut result = Ok(());
        for Frontend { key, flags } in of_scope {
            let value = Service { flags: value.flags | flags, ..value };
            result = result.and(self.write_row(key, value, range, now));
        }
        if let Some(start) = range.first_slot() {
            self.ranges.discard(start, &mut self.backends);
        }
        Ok(result?)
    }

    /// Whether the row would refer external clients to a row that could not be written.
    fn waits_for_external_row(&self, port: &ServicePortKey, frontend: &Frontend) -> bool {
        let external_key = external_key(&frontend.key);
        frontend.flags & ServiceFlags::OUTSIDE != 0
            && self.owns(port, &external_key)
            && !self.rows.contains_key(&external_key)
    }

    /// Whether another row refers external clients to this one.
    fn is_referenced(&self, frontend: &ServiceKey) -> bool {
        let any = ServiceKey { scope: Scope::Any as u8, ..*frontend };
        frontend.scope == Scope::Outside as u8
            && self.rows.get(&any).is_some_and(|row| row.flags & ServiceFlags::OUTSIDE != 0)
    }

    /// A range that one of the frontends already uses, if it has the desired content.
    fn reusable_range(&self, frontends: &[Frontend], content: &[u32]) -> Option<BackendRange> {
        let intact = frontends.iter().map(|it| &it.key).filter(|key| !self.broken.contains_key(key));
        let mut ranges = intact.filter_map(|key| self.rows.get(key)).map(BackendRange::of);
        ranges.find(|range| match range {
            BackendRange::Empty => content.is_empty(),
            BackendRange::Slots(start) => self.ranges.has_content(*start, content),
        })
    }

    fn write_range(&mut self, content: &[u32], now: Instant) -> Result<BackendRange, RangeError> {
        if content.is_empty() {
            return Ok(BackendRange::Empty);
        }
        let mut written = self.ranges.write(content, &mut self.backends, now);
        if let Err(RangeError::Slots(SlotsError::Full { .. } | SlotsError::Fragmented { .. })) = written
            && !self.broken.is_empty()
        {
            self.release_broken_ranges(now);
            written = self.ranges.write(content, &mut self.backends, now);
        }
        written.map(BackendRange::Slots)
    }

    /// Releases the ranges of broken rows: their slots are needed, and their content is unknown.
    fn release_broken_ranges(&mut self, now: Instant) {
        for start in self.broken.values_mut().flat_map(std::mem::take) {
            self.ranges.release(start, &mut self.backends, now);
        }
    }

    /// Writes the row of a frontend unless it is equal.
    fn write_row(
        &mut self,
        frontend: &ServiceKey,
        value: Service,
        range: BackendRange,
        now: Instant,
    ) -> Result<(), TableError> {
        let value = value.with_checksum(frontend);
        let before = self.rows.get(frontend).filter(|_| !self.broken.contains_key(frontend));
        // the generation changes only with the range
        let same = |row: &Service| {
            Service { generation: value.generation, checksum: value.checksum, ..*row } == value
        };
        if before.is_some_and(same) {
            return Ok(());
        }
        self.table.insert(frontend, &value)?;
        if let Some(start) = range.first_slot() {
            self.ranges.acquire(start);
        }
        self.forget_row(frontend, now);
        self.rows.insert(*frontend, value);
        Ok(())
    }

    /// Removes a frontend without an owner. A row that another row refers to stays until that row
    /// changed.
    pub(super) fn remove_unowned(&mut self, frontend: &ServiceKey, now: Instant) -> Result<(), TableError> {
        if self.owners.contains_key(frontend)
            || !self.rows.contains_key(frontend)
            || self.is_referenced(frontend)
        {
            return Ok(());
        }
        self.table.remove(frontend)?;
        self.forget_row(frontend, now);
        Ok(())
    }

    /// Forgets the row of a frontend and releases its ranges.
    fn forget_row(&mut self, frontend: &ServiceKey, now: Instant) {
        let Some(row) = self.rows.remove(frontend) else { return };
        for start in self.ranges_of(frontend, &row) {
            self.ranges.release(start, &mut self.backends, now);
        }
        self.broken.remove(frontend);
        let external_key = external_key(frontend);
        if self.rows.contains_key(&external_key) && !self.owners.contains_key(&external_key) {
            self.queue.push(ServiceWork::Frontend(external_key));
        }
    }
}

/// The same frontend for external clients.
fn external_key(frontend: &ServiceKey) -> ServiceKey {
    ServiceKey { scope: Scope::Outside as u8, ..*frontend }
}
