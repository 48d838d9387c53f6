//! Tables that look, after every single write, at what a reader on another processor could see.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Instant,
};

use dataplane_common::abi::{Addr, BackendSlot, Port, Scope, Service, ServiceFlags, ServiceKey};

use crate::{
    compile::services::{NodeContext, compile},
    datapath::{
        table::{Table, TableError},
        testing::MemoryTable,
    },
    reconcile::slots::QUARANTINE,
    state::Store,
};

/// What a frontend may say: of each service that wants it, the backends by slot, the affinity and the flags.
type Meaning = (Vec<(Addr, Port)>, u32, u32);

/// Knows what is right at any moment.
#[derive(Debug)]
pub(super) struct Checker {
    services: MemoryTable<ServiceKey, Service>,
    backends: MemoryTable<u32, BackendSlot>,
    generations: MemoryTable<u32, u32>,
    expected: HashMap<ServiceKey, Vec<Meaning>>,
    /// When a row last pointed to the slot.
    seen: HashMap<u32, Instant>,
    /// Rows that were broken before there was an agent.
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

    /// From now on this is wanted.
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

/// This node, as far as services know it ([`super::network`]).
fn node_context() -> NodeContext {
    NodeContext { node: "a".to_owned(), ..NodeContext::default() }
}

/// What every frontend should say.
pub(super) fn expected(store: &Store) -> HashMap<ServiceKey, Vec<Meaning>> {
    let node_context = node_context();
    let mut expected: HashMap<ServiceKey, Vec<Meaning>> = HashMap::new();
    for service in store.services() {
        for port in compile(service, store.slices_of(&service.name), &node_context).ports {
            for group in &port.groups {
                let indices: Vec<u32> = (0..group.backends.len() as u32).collect();
                let layout = port.arrange(&group.backends, &indices);
                let slots = layout.iter().map(|index| group.backends[*index as usize]);
                let slots: Vec<_> = slots.map(|b| (b.addr, b.port)).collect();
                for frontend in &group.frontends {
                    let meaning = (slots.clone(), port.affinity_timeout, port.flags() | frontend.flags);
                    expected.entry(frontend.key).or_default().push(meaning);
                }
            }
        }
    }
    expected
}

/// Backends of all services that serve UDP.
pub(super) fn serving(store: &Store) -> BTreeSet<(Addr, Port, u8)> {
    let node_context = node_context();
    let mut serving = BTreeSet::new();
    for service in store.services() {
        for port in compile(service, store.slices_of(&service.name), &node_context).ports {
            let protocol = port.key.protocol.number();
            serving.extend(port.serving.iter().map(|backend| (backend.addr, backend.port, protocol)));
        }
    }
    serving
}

/// What a frontend says.
pub(super) fn meaning(row: &Service, slots: &[BackendSlot]) -> Meaning {
    let mut slots: Vec<_> = slots.iter().map(|slot| (slot.addr, slot.port)).collect();
    // in the order of their numbers, which says nothing
    if row.flags & ServiceFlags::HASH == 0 {
        slots.sort_unstable();
    }
    (slots, row.affinity_timeout, row.flags)
}

/// Is told of a write.
pub(super) trait Witness<K, V> {
    /// `before` and `after`: the entry.
    fn written(&mut self, key: &K, before: Option<&V>, after: Option<&V>);
}

impl Witness<ServiceKey, Service> for Checker {
    /// A frontend always says what one who wants it wants now, and one that is wanted never goes. Where clients from outside
    /// are sent, there is a row for them.
    fn written(&mut self, key: &ServiceKey, before: Option<&Service>, after: Option<&Service>) {
        let was_broken = self.broken.remove(key);
        for before in before.iter().filter(|_| !was_broken) {
            self.seen.extend((before.first_slot..before.first_slot + before.count).map(|i| (i, self.now)));
        }
        let at = |scope: Scope| self.services.get(&ServiceKey { scope: scope as u8, ..*key }).unwrap();
        let sends = at(Scope::Any).is_some_and(|row| row.flags & ServiceFlags::OUTSIDE != 0);
        assert!(
            !sends || at(Scope::Outside).is_some(),
            "{key:?} sends clients from outside where nothing is"
        );
        let wanted = self.expected.get(key);
        let Some(row) = after else {
            assert!(wanted.is_none(), "{key:?} was removed while it is wanted");
            return;
        };
        // of a pod of this node, which the store does not know
        if row.flags & ServiceFlags::HOST_PORT != 0 {
            return;
        }
        let slots = self.slots(row);
        let meaning = meaning(row, &slots);
        let wanted = wanted.expect("only what is wanted is written");
        assert!(wanted.contains(&meaning), "{key:?} says {meaning:?}, but wanted is {wanted:?}");
        for slot in slots {
            let generation = self.generations.get(&slot.id).unwrap().expect("number of the table");
            assert_eq!(slot.generation, generation, "generation of backend {slot:?}");
        }
    }
}

impl Witness<u32, BackendSlot> for Checker {
    /// A slot that may be read is never written.
    fn written(&mut self, index: &u32, _: Option<&BackendSlot>, _: Option<&BackendSlot>) {
        for (key, row) in self.rows() {
            let range = row.first_slot..row.first_slot + row.count;
            assert!(!range.contains(index), "slot {index} was written under {key:?}");
        }
        if let Some(seen) = self.seen.get(index) {
            assert!(self.now - *seen >= QUARANTINE, "slot {index} was written too early");
        }
    }
}

impl Witness<u32, u32> for Checker {
    /// The generation of a backend that may be chosen does not change: its flows would be cut.
    fn written(&mut self, id: &u32, _: Option<&u32>, generation: Option<&u32>) {
        for (key, row) in self.rows() {
            for slot in self.slots(&row) {
                let same = slot.id != *id || Some(&slot.generation) == generation;
                assert!(same, "the generation of backend {id} of {key:?} changed");
            }
        }
    }
}

/// A table that tells the checker.
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
    Checker: Witness<K, V>,
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
        self.checker.lock().unwrap().written(key, before.as_ref(), Some(value));
        Ok(())
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let before = self.table.get(key)?;
        self.table.remove(key)?;
        self.checker.lock().unwrap().written(key, before.as_ref(), None);
        Ok(())
    }

    fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        self.table.entries()
    }

    fn capacity(&self) -> u32 {
        self.table.capacity()
    }
}
