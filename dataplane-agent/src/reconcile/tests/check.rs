//! Tables that check, after every write, what a concurrent reader could see.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Instant,
};

use dataplane_common::abi::{Addr, BackendSlot, Port, Scope, Service, ServiceFlags, ServiceKey};

use crate::{
    compile::services::{NodeContext, ServicePortKey, compile},
    datapath::{
        table::{Table, TableError},
        testing::MemoryTable,
    },
    reconcile::slots::QUARANTINE,
    state::Store,
};

/// A valid content of a frontend: the backends by slot, the affinity timeout and the flags.
type Content = (Vec<(Addr, Port)>, u32, u32);

/// Checks every write against the invariants.
#[derive(Debug)]
pub(super) struct Checker {
    services: MemoryTable<ServiceKey, Service>,
    backends: MemoryTable<u32, BackendSlot>,
    generations: MemoryTable<u32, u32>,
    expected: HashMap<ServiceKey, Vec<Content>>,
    /// When a row last used the slot.
    seen: HashMap<u32, Instant>,
    /// Rows that were broken before the agent started.
    pub(super) broken: HashSet<ServiceKey>,
    pub(super) now: Instant,
}

impl Checker {
    pub(super) fn new(
        services: MemoryTable<ServiceKey, Service>,
        backends: MemoryTable<u32, BackendSlot>,
        generations: MemoryTable<u32, u32>,
        now: Instant,
    ) -> Self {
        Self {
            services,
            backends,
            generations,
            expected: HashMap::new(),
            seen: HashMap::new(),
            broken: HashSet::new(),
            now,
        }
    }

    /// Sets the expected content.
    pub(super) fn expect(&mut self, store: &Store) {
        self.expected = expected(store);
    }

    fn rows(&self) -> Vec<(ServiceKey, Service)> {
        let rows = self.services.entries().unwrap().into_iter();
        rows.filter(|(key, _)| !self.broken.contains(key)).collect()
    }

    fn slots(&self, row: &Service) -> Vec<BackendSlot> {
        let slots = row.first_slot..row.first_slot + row.count;
        slots.map(|index| self.backends.get(&index).unwrap().expect("slot of the table")).collect()
    }
}

/// The node context of the tests ([`super::network`]).
fn node_context() -> NodeContext {
    NodeContext { node: "a".to_owned(), ..NodeContext::default() }
}

/// The expected contents of every frontend.
pub(super) fn expected(store: &Store) -> HashMap<ServiceKey, Vec<Content>> {
    let node_context = node_context();
    let mut expected: HashMap<ServiceKey, Vec<Content>> = HashMap::new();
    for service in store.services() {
        for port in compile(service, store.slices_of(&service.name), &node_context).ports {
            for group in &port.groups {
                let indices: Vec<u32> = (0..group.backends.len() as u32).collect();
                let layout = port.slot_layout(&group.backends, &indices);
                let slots = layout.iter().map(|index| group.backends[*index as usize]);
                let slots: Vec<_> = slots.map(|b| (b.addr, b.port)).collect();
                for frontend in &group.frontends {
                    let content = (slots.clone(), port.affinity_timeout, port.flags() | frontend.flags);
                    expected.entry(frontend.key).or_default().push(content);
                }
            }
        }
    }
    expected
}

/// Serving UDP backends of each service port.
pub(super) fn serving_udp(store: &Store) -> Vec<(ServicePortKey, Addr, Port)> {
    let node_context = node_context();
    let mut serving_udp = Vec::new();
    for service in store.services() {
        for port in compile(service, store.slices_of(&service.name), &node_context).ports {
            let backends = port.serving_udp.iter();
            serving_udp.extend(backends.map(|backend| (port.key.clone(), backend.addr, backend.port)));
        }
    }
    serving_udp
}

/// The content of a frontend.
pub(super) fn content(row: &Service, slots: &[BackendSlot]) -> Content {
    let mut slots: Vec<_> = slots.iter().map(|slot| (slot.addr, slot.port)).collect();
    // ordered by ID, which has no meaning
    if row.flags & ServiceFlags::HASH == 0 {
        slots.sort_unstable();
    }
    (slots, row.affinity_timeout, row.flags)
}

/// Observes writes.
pub(super) trait Observer<K, V> {
    /// `before` and `after` are the values of the entry.
    fn on_write(&mut self, key: &K, before: Option<&V>, after: Option<&V>);
}

impl Observer<ServiceKey, Service> for Checker {
    /// A row always has the desired content of one of its contenders, a desired row is never
    /// removed, and a row for external clients exists where another refers to it.
    fn on_write(&mut self, key: &ServiceKey, before: Option<&Service>, after: Option<&Service>) {
        let was_broken = self.broken.remove(key);
        for before in before.iter().filter(|_| !was_broken) {
            self.seen.extend((before.first_slot..before.first_slot + before.count).map(|i| (i, self.now)));
        }
        let at = |scope: Scope| self.services.get(&ServiceKey { scope: scope as u8, ..*key }).unwrap();
        let refers = at(Scope::Any).is_some_and(|row| row.flags & ServiceFlags::OUTSIDE != 0);
        assert!(!refers || at(Scope::Outside).is_some(), "{key:?} refers external clients to a missing row");
        let desired = self.expected.get(key);
        let Some(row) = after else {
            assert!(desired.is_none(), "{key:?} was removed while it is desired");
            return;
        };
        // a host port: the store does not contain it
        if row.flags & ServiceFlags::HOST_PORT != 0 {
            return;
        }
        let slots = self.slots(row);
        let content = content(row, &slots);
        let desired = desired.expect("only desired rows are written");
        assert!(desired.contains(&content), "{key:?} has {content:?}, expected one of {desired:?}");
        for slot in slots {
            let generation = self.generations.get(&slot.id).unwrap().expect("ID within the table");
            assert_eq!(slot.generation, generation, "generation of backend {slot:?}");
        }
    }
}

impl Observer<u32, BackendSlot> for Checker {
    /// A slot that a reader may use is never written.
    fn on_write(&mut self, index: &u32, _: Option<&BackendSlot>, _: Option<&BackendSlot>) {
        for (key, row) in self.rows() {
            let range = row.first_slot..row.first_slot + row.count;
            assert!(!range.contains(index), "slot {index} was written under {key:?}");
        }
        if let Some(seen) = self.seen.get(index) {
            assert!(self.now - *seen >= QUARANTINE, "slot {index} was written too early");
        }
    }
}

impl Observer<u32, u32> for Checker {
    /// The generation of a usable backend does not change: that would break its flows.
    fn on_write(&mut self, id: &u32, _: Option<&u32>, generation: Option<&u32>) {
        for (key, row) in self.rows() {
            for slot in self.slots(&row) {
                let same = slot.id != *id || Some(&slot.generation) == generation;
                assert!(same, "the generation of backend {id} of {key:?} changed");
            }
        }
    }
}

/// A table that reports its writes to the checker.
#[derive(Debug)]
pub(super) struct Checked<K, V> {
    table: MemoryTable<K, V>,
    checker: Arc<Mutex<Checker>>,
}

impl<K, V> Checked<K, V> {
    pub(super) fn new(table: MemoryTable<K, V>, checker: &Arc<Mutex<Checker>>) -> Self {
        Self { table, checker: Arc::clone(checker) }
    }
}

impl<K, V> Table<K, V> for Checked<K, V>
where
    K: Ord + Clone + Send,
    V: Clone + Send,
    Checker: Observer<K, V>,
{
    fn name(&self) -> &'static str {
        self.table.name()
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        self.table.get(key)
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let before = self.table.get(key)?;
        self.table.insert(key, value)?;
        self.checker.lock().unwrap().on_write(key, before.as_ref(), Some(value));
        Ok(())
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let before = self.table.get(key)?;
        self.table.remove(key)?;
        self.checker.lock().unwrap().on_write(key, before.as_ref(), None);
        Ok(())
    }

    fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        self.table.entries()
    }

    fn capacity(&self) -> u32 {
        self.table.capacity()
    }
}
