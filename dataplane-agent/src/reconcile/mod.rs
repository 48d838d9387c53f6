//! Reconciles desired and actual state: the only writer of the datapath's tables, and the source of
//! the desired kernel routes.
//!
//! [`Reconciler`] belongs to one task. Inputs set the desired state and return at once, except for
//! pods of this node, which are written before the call returns, because the CNI waits.
//! [`Reconciler::work`] writes the rest, key by key; a failed key backs off on its own.
//! [`Reconciler::adopt`] takes over the tables of an earlier agent: correct rows are not written
//! again, and unknown rows are removed only after everything that exists was delivered
//! ([`Reconciler::synced`], [`Reconciler::pods_loaded`]). Knows no Kubernetes type, no aya and no
//! netlink message.

pub mod allowed_sources;
pub mod backoff;
pub mod devices;
pub mod endpoints;
mod host;
pub mod instrumented;
pub mod kernel_routes;
mod owners;
mod pod_sources;
pub mod routes;
pub mod services;
pub mod slots;
pub mod sockets;
#[cfg(test)]
mod tests;
pub mod views;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use dataplane_common::abi::{
    Addr, BackendSlot, ClusterRange, Endpoint, PodSource, Route, RouteKind, Service, ServiceKey,
};
use tokio::sync::mpsc::UnboundedSender;

pub use allowed_sources::AllowedSources;
pub use devices::Devices;
pub use endpoints::{EndpointError, LocalPod};
pub use host::HostPorts;
pub use kernel_routes::{InstalledRoutes, KernelRoutes, KernelUpdate};
pub use routes::NodeNetwork;
pub use sockets::{KernelSockets, SocketUpdate, Sockets};

use self::{endpoints::Endpoints, kernel_routes::KernelSweep, routes::Routes, services::Services};
use crate::{
    compile::{self, services::NodeContext},
    datapath::{
        Tables,
        table::{RoutePrefix, SourcePrefix, Table, TableError},
    },
    state::{Changes, NamespacedName, Store},
};

/// Approximate maximum of writes in one call of [`Reconciler::work`], so that the task can serve
/// other events.
const MAX_WRITES: u64 = 2_000;
/// Node label with the zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Maximum of keys in one call.
const MAX_KEYS: usize = 2_000;

/// The tables the reconciler writes.
pub struct ReconcileTables {
    pub endpoints: Box<dyn Table<Addr, Endpoint>>,
    pub pod_sources: Box<dyn Table<u32, PodSource>>,
    pub routes: Box<dyn Table<RoutePrefix, Route>>,
    pub services: Box<dyn Table<ServiceKey, Service>>,
    pub backends: Box<dyn Table<u32, BackendSlot>>,
    pub backend_generations: Box<dyn Table<u32, u32>>,
    pub source_ranges: Box<dyn Table<SourcePrefix, u32>>,
}

impl From<Tables> for ReconcileTables {
    fn from(tables: Tables) -> Self {
        Self {
            endpoints: Box::new(tables.endpoints),
            pod_sources: Box::new(tables.pod_sources),
            routes: Box::new(tables.routes),
            services: Box::new(tables.services),
            backends: Box::new(tables.backends),
            backend_generations: Box::new(tables.backend_generations),
            source_ranges: Box::new(tables.source_ranges),
        }
    }
}

/// Desired and actual state of all tables.
#[derive(Debug)]
pub struct Reconciler {
    endpoints: Endpoints,
    routes: Routes,
    services: Services,
    /// Node properties that Service entries depend on.
    node_context: NodeContext,
    /// Revision of the state taken into account.
    revision: u64,
    /// Revision completely written to the tables.
    applied: u64,
    drift: u64,
    /// Addresses of frontends that may be host addresses: those of host ports, external IPs and
    /// load balancer IPs.
    frontend_addresses: BTreeMap<NamespacedName, BTreeSet<Addr>>,
    synced: bool,
    pods_loaded: bool,
    /// The table to audit next.
    audit: Audit,
}

/// Tables are audited in turn, so that one audit is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Audit {
    Endpoints,
    Routes,
    Services,
    Backends,
    Generations,
}

/// Number of rows adopted from an earlier agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    pub endpoints: usize,
    pub routes: usize,
    pub services: usize,
    pub backends: usize,
    /// Rows of `SERVICES` with an invalid range or checksum: rewritten once their content is known.
    pub broken: usize,
}

impl Reconciler {
    /// Creates a reconciler that is the only writer of `tables`. Desired kernel routes go to
    /// `kernel`, the other end of [`KernelRoutes`].
    pub fn new(tables: impl Into<ReconcileTables>, kernel: UnboundedSender<KernelUpdate>) -> Self {
        let tables = tables.into();
        Self {
            endpoints: Endpoints::new(tables.endpoints, tables.pod_sources),
            routes: Routes::new(tables.routes, kernel),
            services: Services::new(
                tables.services,
                tables.backends,
                tables.backend_generations,
                tables.source_ranges,
            ),
            node_context: NodeContext::default(),
            revision: 0,
            applied: 0,
            drift: 0,
            frontend_addresses: BTreeMap::new(),
            synced: false,
            pods_loaded: false,
            audit: Audit::Endpoints,
        }
    }

    /// Where to see which kernel routes are in place: [`KernelRoutes::installed`].
    pub fn set_installed_routes(&mut self, installed: InstalledRoutes) {
        self.routes.installed = Some(installed);
    }

    /// Adopts the rows in the tables. Call it once, before anything else.
    pub fn adopt(&mut self) -> Result<Adopted, TableError> {
        let (services, backends, broken) = self.services.adopt()?;
        Ok(Adopted {
            endpoints: self.endpoints.adopt()?,
            routes: self.routes.adopt()?,
            services,
            backends,
            broken,
        })
    }

    /// Compiles the objects that `changes` names.
    pub fn apply_changes(&mut self, store: &Store, changes: &Changes) {
        self.nodes_changed(store, changes.nodes.iter().map(String::as_str));
        self.routes.service_cidrs_changed(store, &changes.service_cidrs);
        self.services_changed(store, &changes.services);
        if changes.synced {
            self.synced();
        }
        self.revision = store.revision();
    }

    /// Compiles added, changed and removed nodes; all nodes if this node changed.
    fn nodes_changed<'a>(&mut self, store: &Store, names: impl IntoIterator<Item = &'a str>) {
        self.routes.nodes_changed(store, names);
    }

    /// Compiles Services that were added, changed or removed, or whose slices were.
    fn services_changed<'a>(&mut self, store: &Store, names: impl IntoIterator<Item = &'a NamespacedName>) {
        // most changes affect only endpoints: update the host's entries only if addresses changed
        let had_node_ports = self.services.has_node_ports();
        let mut changed = false;
        for name in names {
            let service = store.service(name);
            let entries = service.map(|service| {
                compile::services::compile(service, store.slices_of(name), &self.node_context)
            });
            let external = service.into_iter().flat_map(|service| {
                service.external_ips.iter().chain(&service.load_balancer_ips).map(|ip| Addr::from(*ip))
            });
            changed |= self.set_frontend_addresses(name, external.collect());
            self.services.set(name, entries);
        }
        if changed || had_node_ports != self.services.has_node_ports() {
            self.publish_frontends();
        }
    }

    /// Sets the network of this node, at start and on changes: all routes are compiled again.
    pub fn set_network(&mut self, network: NodeNetwork, store: &Store) {
        let labels = store.node(&network.own).map(|node| &node.labels);
        let zone = labels.and_then(|labels| labels.get(ZONE_LABEL)).map(|zone| zone.as_str().into());
        let node_context = NodeContext {
            node: network.own.clone(),
            zone,
            host: self.node_context.host.clone(),
            load_balancing: network.load_balancing,
            forwarding: network.forwarding,
        };
        self.set_node_context(node_context, store);
        self.routes.set_network(network, store);
        for (id, pod) in &self.endpoints.pods {
            self.routes.set_pod(id, Some(&pod.device));
        }
    }

    /// Sets the node context; if it changed, compiles all known Services again.
    fn set_node_context(&mut self, node_context: NodeContext, store: &Store) {
        if node_context != self.node_context {
            self.node_context = node_context;
            let names = store.services().map(|service| &service.name);
            let known: Vec<_> = names.filter(|name| self.services.is_known(name)).cloned().collect();
            self.services_changed(store, &known);
        }
    }

    /// Prefixes that contain all cluster IPs, IPv4 and IPv6.
    pub fn cluster_ranges(&self) -> [ClusterRange; 2] {
        self.services.cluster_ranges()
    }

    /// All pods of this node were passed to [`Self::upsert_pod`]: entries of other pods are
    /// removed.
    pub fn pods_loaded(&mut self) {
        self.pods_loaded = true;
        self.publish_frontends();
        self.endpoints.sweep_pods();
        self.routes.sweep_kernel(KernelSweep::Pods);
        self.sweep_services();
    }

    /// The source has delivered all objects: other entries are removed.
    fn synced(&mut self) {
        self.endpoints.sweep_host();
        self.routes.sweep();
        self.routes.sweep_kernel(KernelSweep::Nodes);
        self.synced = true;
        self.publish_frontends();
        self.services.on_synced();
        self.sweep_services();
    }

    /// Frontends come from the source and from pods: both must be complete.
    fn sweep_services(&mut self) {
        if self.synced && self.pods_loaded {
            self.services.host_ports_changed = true;
            self.services.sweep();
        }
    }

    /// Reconciles due keys, up to a limit. Returns when to call it again: now if there is more,
    /// `None` if nothing is due until an input changes.
    pub fn work(&mut self, now: Instant) -> Option<Instant> {
        let write_limit = self.changes() + MAX_WRITES;
        let mut keys = 0..MAX_KEYS;
        while self.changes() < write_limit && keys.next().is_some() {
            let worked =
                self.endpoints.work_one(now) || self.routes.work_one(now) || self.services.work_one(now);
            if !worked {
                self.services.scan_step();
                break;
            }
        }
        if self.is_settled() {
            self.applied = self.revision;
        }
        self.next_due(now)
    }

    /// Audits the next table; differences are repaired by later [`Self::work`]. Returns whether
    /// every table had its turn. Call it by timer.
    pub fn audit(&mut self) -> Result<bool, TableError> {
        let (next, different) = match self.audit {
            Audit::Endpoints => (Audit::Routes, self.endpoints.audit()?),
            Audit::Routes => (Audit::Services, self.routes.audit()?),
            Audit::Services => (Audit::Backends, self.services.audit_frontends()?),
            Audit::Backends => (Audit::Generations, self.services.audit_ranges()?),
            Audit::Generations => (Audit::Endpoints, self.services.backends.audit()?),
        };
        self.audit = next;
        self.drift += different;
        Ok(next == Audit::Endpoints)
    }

    /// UDP backends added and removed since the last call, in order.
    pub fn take_udp_backend_updates(&mut self) -> Vec<SocketUpdate> {
        self.services.backends.take_udp_updates()
    }

    /// All UDP backends.
    pub fn udp_backends(&self) -> SocketUpdate {
        SocketUpdate::AllBackends(self.services.backends.udp().collect())
    }

    /// Whether the table has a route through the overlay.
    pub fn uses_overlay(&self) -> bool {
        self.routes.actual.values().any(|route| route.kind() == Some(RouteKind::Overlay))
    }

    /// Checks that a pod's entries are in the table; the error says what is missing.
    pub fn check_pod(&self, id: &str) -> Result<(), String> {
        self.endpoints.check_pod(id)
    }

    /// Whether all desired state is written.
    pub fn is_settled(&self) -> bool {
        self.endpoints.is_settled() && self.routes.is_settled() && self.services.is_settled()
    }

    /// Revision of the state that is completely in the tables.
    pub const fn applied_revision(&self) -> u64 {
        self.applied
    }

    /// Number of rows written or removed since the agent started.
    pub fn changes(&self) -> u64 {
        self.endpoints.changes() + self.routes.changes() + self.services.changes()
    }
}
