//! A node's agent from objects to tables: as in `app/node`, but without programs.

use std::time::{Duration, Instant};

use dataplane_agent::{
    reconcile::{KernelUpdate, Reconciler},
    state::{Changes, Object, SourceEvent, Store},
};
use dataplane_common::abi::{Scope, names::map};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::{
    cluster::{self, NODES, PODS},
    tables::Tables,
};

/// Longer than the time after which an unreferenced range of slots is reused.
const SLOT_REUSE_DELAY: Duration = Duration::from_secs(2);

/// An agent and its tables.
pub(crate) struct Agent {
    pub(crate) node: usize,
    pub(crate) tables: Tables,
    reconciler: Reconciler,
    store: Store,
    now: Instant,
    // unused, but keeps the channel open
    _kernel: UnboundedReceiver<KernelUpdate>,
}

impl Agent {
    /// Creates an agent of a cluster without services.
    pub(crate) fn new(node: usize) -> Self {
        let tables = Tables::new();
        let (sender, kernel) = mpsc::unbounded_channel();
        let mut reconciler = Reconciler::new(&tables, sender);
        reconciler.adopt().expect("empty tables");
        let now = Instant::now();
        let mut agent = Self { node, tables, reconciler, store: Store::default(), now, _kernel: kernel };
        let nodes =
            (0..NODES.len()).map(|node| SourceEvent::Upsert(Object::Node(cluster::node_object(node))));
        agent.store_events(nodes.chain([SourceEvent::Synced]));
        agent.reconciler.set_network(cluster::network(node), &agent.store);
        agent.reconciler.set_host_addresses(cluster::node_addresses(node), &agent.store, now);
        for pod in 0..PODS {
            let id = format!("pod-{pod}");
            agent.reconciler.upsert_pod(&id, &cluster::local_pod(node, pod), now).expect("room for a pod");
        }
        agent.reconciler.pods_loaded();
        agent.settle();
        agent.reset_writes();
        agent
    }

    /// Applies events that arrived together. When this returns, the tables are updated and the
    /// replaced slots are reusable.
    pub(crate) fn apply(&mut self, events: impl IntoIterator<Item = SourceEvent>) {
        self.store_events(events);
        self.settle();
        self.now += SLOT_REUSE_DELAY;
    }

    fn store_events(&mut self, events: impl IntoIterator<Item = SourceEvent>) {
        let mut changes = Changes::default();
        for event in events {
            changes.merge(self.store.apply(event));
        }
        self.reconciler.apply_changes(&self.store, &changes);
    }

    fn settle(&mut self) {
        for _ in 0..1_000 {
            let Some(due) = self.reconciler.work(self.now) else { break };
            self.now = self.now.max(due);
        }
        assert!(self.reconciler.is_settled(), "{:?}", self.reconciler.problems());
    }

    /// Reconciles all services again, as after a relist, and returns the number of writes.
    pub(crate) fn rewrites(&mut self) -> u64 {
        let before = self.reconciler.changes();
        let names = self.store.services().map(|service| service.name.clone()).collect();
        self.reconciler.apply_changes(&self.store, &Changes { services: names, ..Changes::default() });
        self.settle();
        while !self.reconciler.audit().expect("tables in memory") {}
        self.settle();
        self.reconciler.changes() - before
    }

    /// Keys that were written more than once since the last call: one change needs one write.
    pub(crate) fn written_twice(&self) -> Vec<String> {
        let mut twice = Vec::new();
        let mut note = |what: String, times: u32| {
            if times > 1 {
                twice.push(format!("{what}, {times} times"));
            }
        };
        for (key, times) in self.tables.services.take_writes() {
            let scope = if key.scope == Scope::Any as u8 { "" } else { " for external clients" };
            note(format!("frontend {}:{}/{}{scope}", key.addr, key.port, key.protocol), times);
        }
        for (slot, times) in self.tables.backends.take_writes() {
            note(format!("slot {slot}"), times);
        }
        for (id, times) in self.tables.generations.take_writes() {
            note(format!("generation of {id}"), times);
        }
        for (prefix, times) in self.tables.source_ranges.take_writes() {
            note(format!("source range {prefix:?}"), times);
        }
        twice
    }

    fn reset_writes(&self) {
        let _initial = self.written_twice();
    }

    /// The number of used entries of a table, as the agent reports it.
    pub(crate) fn used(&self, table: &str) -> u64 {
        let tables = self.reconciler.tables();
        tables.iter().find(|view| view.name == table).expect("a table of the reconciler").used
    }

    pub(crate) fn slots_used(&self) -> u64 {
        self.used(map::BACKENDS)
    }
}
