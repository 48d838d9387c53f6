//! One service: its ranges, its frontends, in the order that is right for readers.

use std::time::Instant;

use dataplane_common::abi::{Scope, Service, ServiceFlags, ServiceKey};

use super::{BackendKey, ServiceWork, Services, ranges::RangeError};
use crate::{
    compile::services::{Backend, Frontend, PortEntries, ServicePortKey},
    datapath::table::TableError,
    reconcile::slots::SlotsError,
    state::NamespacedName,
};

/// What the frontends of a port lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// No backend is ready.
    Nothing,
    /// A range, by its first slot.
    Range(u32),
}

impl Backing {
    /// Of a row that is sound.
    pub(super) const fn of(row: &Service) -> Self {
        if row.count == 0 { Self::Nothing } else { Self::Range(row.first_slot) }
    }

    pub(super) const fn range(self) -> Option<u32> {
        match self {
            Self::Nothing => None,
            Self::Range(start) => Some(start),
        }
    }
}

impl Services {
    /// Makes a service what it should be. A port that cannot be made does not keep the others.
    pub(super) fn apply(&mut self, name: &NamespacedName, now: Instant) -> Result<(), RangeError> {
        let Some(entries) = self.wanted.get(name).cloned() else { return Ok(()) };
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
        let found = port.frontends().filter(|key| self.has(&port.key, key));
        let found: Vec<u32> = found.filter_map(|key| Some(self.rows.get(key)?.id)).collect();
        let id = self.ids.number(&port.key, found);
        // who may ask is known before the first packet asks whether he may: else what is guarded stays as it is
        let guarded = self.sources.allow(id, &port.source_ranges);
        let unready = |it: &Frontend| guarded.is_err() && it.flags & ServiceFlags::SOURCE_RANGES != 0;
        let mut groups = Vec::new();
        for group in &port.groups {
            let ours = group.frontends.iter().filter(|it| self.has(&port.key, &it.key) && !unready(it));
            let ours: Vec<Frontend> = ours.copied().collect();
            if !self.complete && group.backends.is_empty() && self.leads_somewhere(&ours) {
                self.early.insert(name.clone());
            } else {
                groups.push((ours, &group.backends));
            }
        }
        let mut result = Ok(());
        // the rows for clients from outside first: a row that sends them there must not come before
        for scope in [Scope::Outside, Scope::Any] {
            for (frontends, backends) in &groups {
                result = result.and(self.apply_group(port, id, frontends, scope, backends, now));
            }
        }
        guarded?;
        result?;
        Ok(self.sources.restrict(id, &port.source_ranges)?)
    }

    /// Whether the port has the frontend: others that want it have to wait.
    fn has(&self, port: &ServicePortKey, frontend: &ServiceKey) -> bool {
        self.holders.get(frontend) == Some(port)
    }

    /// Whether a frontend of an earlier agent has backends.
    fn leads_somewhere(&self, frontends: &[Frontend]) -> bool {
        frontends.iter().filter_map(|it| self.rows.get(&it.key)).any(|row| row.count > 0)
    }

    /// Makes the frontends of a scope what they should be. Those of a group share a range.
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
            .filter(|it| it.key.scope == scope as u8 && !self.waits_for_outside(&port.key, it))
            .collect();
        if of_scope.is_empty() {
            return Ok(());
        }
        let protocol = port.key.protocol.number();
        let keys = backends.iter().map(|b| BackendKey { addr: b.addr, port: b.port, protocol });
        let last = frontends.iter().filter_map(|it| self.rows.get(&it.key)).map(|row| row.generation).max();

        let numbers: Option<Vec<u32>> = keys.clone().map(|key| self.backends.id(&key)).collect();
        let content = numbers.map(|numbers| port.arrange(backends, &numbers));
        let fitting = content.and_then(|content| Some((self.fitting(frontends, &content)?, content.len())));
        let (backing, count, generation) = if let Some((backing, count)) = fitting {
            (backing, count, last.unwrap_or(1))
        } else {
            let numbers: Vec<u32> = keys.map(|key| self.backends.number(key)).collect::<Result<_, _>>()?;
            let content = port.arrange(backends, &numbers);
            (self.write_range(&content, now)?, content.len(), last.unwrap_or(0).wrapping_add(1))
        };
        let value = Service {
            id,
            first_slot: backing.range().unwrap_or(0),
            count: count as u32,
            affinity_timeout: port.affinity_timeout,
            generation,
            flags: port.flags(),
            // its row's
            checksum: 0,
        };
        let mut result = Ok(());
        for Frontend { key, flags } in of_scope {
            let value = Service { flags: value.flags | flags, ..value };
            result = result.and(self.point(key, value, backing, now));
        }
        if let Some(start) = backing.range() {
            self.ranges.discard(start, &mut self.backends);
        }
        Ok(result?)
    }

    /// Whether the row would send clients from outside to one of ours that could not be written.
    fn waits_for_outside(&self, port: &ServicePortKey, frontend: &Frontend) -> bool {
        let outside = outside(&frontend.key);
        frontend.flags & ServiceFlags::OUTSIDE != 0
            && self.has(port, &outside)
            && !self.rows.contains_key(&outside)
    }

    /// Whether a row sends clients from outside to this one.
    fn is_sent_to(&self, frontend: &ServiceKey) -> bool {
        let any = ServiceKey { scope: Scope::Any as u8, ..*frontend };
        frontend.scope == Scope::Outside as u8
            && self.rows.get(&any).is_some_and(|row| row.flags & ServiceFlags::OUTSIDE != 0)
    }

    /// What one of the frontends points to already, if that holds what it should.
    fn fitting(&self, frontends: &[Frontend], content: &[u32]) -> Option<Backing> {
        let sound = frontends.iter().map(|it| &it.key).filter(|key| !self.broken.contains_key(key));
        let mut backings = sound.filter_map(|key| self.rows.get(key)).map(Backing::of);
        backings.find(|backing| match backing {
            Backing::Nothing => content.is_empty(),
            Backing::Range(start) => self.ranges.holds(*start, content),
        })
    }

    fn write_range(&mut self, content: &[u32], now: Instant) -> Result<Backing, RangeError> {
        if content.is_empty() {
            return Ok(Backing::Nothing);
        }
        let mut written = self.ranges.write(content, &mut self.backends, now);
        if let Err(RangeError::Slots(SlotsError::Full { .. } | SlotsError::Fragmented { .. })) = written
            && !self.broken.is_empty()
        {
            self.give_up_broken(now);
            written = self.ranges.write(content, &mut self.backends, now);
        }
        written.map(Backing::Range)
    }

    /// What broken rows point into is needed: nobody can say what they mean anyway.
    fn give_up_broken(&mut self, now: Instant) {
        for start in self.broken.values_mut().flat_map(std::mem::take) {
            self.ranges.release(start, &mut self.backends, now);
        }
    }

    /// Writes the row of a frontend, if it says something else.
    fn point(
        &mut self,
        frontend: &ServiceKey,
        value: Service,
        backing: Backing,
        now: Instant,
    ) -> Result<(), TableError> {
        let value = value.with_checksum(frontend);
        let before = self.rows.get(frontend).filter(|_| !self.broken.contains_key(frontend));
        // the generation tells changes of the backends, and the range is the same
        let same = |row: &Service| {
            Service { generation: value.generation, checksum: value.checksum, ..*row } == value
        };
        if before.is_some_and(same) {
            return Ok(());
        }
        self.table.insert(frontend, &value)?;
        if let Some(start) = backing.range() {
            self.ranges.hold(start);
        }
        self.forget(frontend, now);
        self.rows.insert(*frontend, value);
        Ok(())
    }

    /// Removes a frontend that nobody wants. One a row still sends clients to stays until that row is another.
    pub(super) fn drop_unclaimed(&mut self, frontend: &ServiceKey, now: Instant) -> Result<(), TableError> {
        if self.holders.contains_key(frontend)
            || !self.rows.contains_key(frontend)
            || self.is_sent_to(frontend)
        {
            return Ok(());
        }
        self.table.remove(frontend)?;
        self.forget(frontend, now);
        Ok(())
    }

    /// The row that was there is no more: nor is what it held.
    fn forget(&mut self, frontend: &ServiceKey, now: Instant) {
        let Some(row) = self.rows.remove(frontend) else { return };
        for start in self.ranges_of(frontend, &row) {
            self.ranges.release(start, &mut self.backends, now);
        }
        self.broken.remove(frontend);
        let outside = outside(frontend);
        if self.rows.contains_key(&outside) && !self.holders.contains_key(&outside) {
            self.queue.push(ServiceWork::Frontend(outside));
        }
    }
}

/// The same frontend for clients from outside.
fn outside(frontend: &ServiceKey) -> ServiceKey {
    ServiceKey { scope: Scope::Outside as u8, ..*frontend }
}
