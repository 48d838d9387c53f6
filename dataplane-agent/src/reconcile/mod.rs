//! Desired against actual: the one owner of what stands in the datapath's tables, and of what is asked of the
//! kernel's routes.
//!
//! [`Reconciler`] belongs to one task. Inputs say what is wanted and return at once, except for the pods of this node,
//! which the CNI waits for; [`Reconciler::work`] makes it so, key by key, and a key that fails waits by itself. What an
//! earlier agent left is taken over by [`Reconciler::adopt`]: rows that are still right are never written again, and
//! rows nobody wants are removed only when everything that exists has been heard of ([`Reconciler::synced`],
//! [`Reconciler::pods_loaded`]). Knows no Kubernetes type, no aya and no netlink message.

pub mod backoff;
mod claims;
pub mod endpoints;
pub mod instrumented;
pub mod kernel_routes;
pub mod routes;
pub mod services;
pub mod slots;
pub mod sockets;
#[cfg(test)]
mod tests;
pub mod views;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use dataplane_common::abi::{
    Addr, BackendSlot, ClusterRange, Endpoint, Route, RouteKind, Service, ServiceKey,
};
use tokio::sync::mpsc::UnboundedSender;

pub use endpoints::{EndpointError, LocalPod};
pub use kernel_routes::{KernelRoutes, KernelUpdate};
pub use routes::NodeNetwork;
pub use sockets::{KernelSockets, SocketUpdate, Sockets};

use self::{
    endpoints::{Asked, Endpoints},
    kernel_routes::KernelSweep,
    routes::Routes,
    services::Services,
};
use crate::{
    compile::{
        self,
        services::{NodeContext, PortEntries},
    },
    datapath::{
        Tables,
        table::{RoutePrefix, SourcePrefix, Table, TableError},
    },
    state::{Changes, NamespacedName, Store},
};

/// Writes in one call of [`Reconciler::work`], more or less: the rest of the task must get its turn.
const WRITES: u64 = 2_000;
/// Label of a node that names its zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Keys in one call, whether or not there was something to write.
const KEYS: usize = 2_000;

/// The tables that are written.
pub struct ReconcileTables {
    pub endpoints: Box<dyn Table<Addr, Endpoint>>,
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
            routes: Box::new(tables.routes),
            services: Box::new(tables.services),
            backends: Box::new(tables.backends),
            backend_generations: Box::new(tables.backend_generations),
            source_ranges: Box::new(tables.source_ranges),
        }
    }
}

/// What is wanted, what is there, and the work between them.
#[derive(Debug)]
pub struct Reconciler {
    endpoints: Endpoints,
    routes: Routes,
    services: Services,
    /// What this node is to the services.
    node_context: NodeContext,
    /// Revision of the state that has been taken in.
    revision: u64,
    /// Revision that is in the tables completely.
    applied: u64,
    drift: u64,
    /// Addresses of frontends that may be the host's: of ports that lead to a pod, and external ones of services.
    addresses: BTreeMap<NamespacedName, BTreeSet<Addr>>,
    synced: bool,
    pods_loaded: bool,
    /// The table the next audit looks at.
    audit: Audit,
}

/// Under which name the ports of a pod stand in the tables; `None`: it has none.
fn host_ports_name(pod: &LocalPod) -> Option<NamespacedName> {
    // a runtime outside of Kubernetes does not say who the pod is
    let name = if pod.name.is_empty() { &pod.device_name } else { &pod.name };
    (!pod.port_mappings.is_empty()).then(|| compile::host_ports::name(&pod.namespace, name))
}

/// Ports of the host that lead to pods or services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPorts {
    pub ports: BTreeSet<u16>,
    /// These are all. Until then an earlier agent may have had others that are still wanted.
    pub complete: bool,
}

/// Tables are audited in turn, so that no audit takes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Audit {
    Endpoints,
    Routes,
    Services,
    Backends,
    Generations,
}

/// What was found in the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    pub endpoints: usize,
    pub routes: usize,
    pub services: usize,
    pub backends: usize,
    /// Rows of `SERVICES` whose range cannot be: they are rewritten when what they should say is known.
    pub broken: usize,
}

impl Reconciler {
    /// Over tables nobody else writes. Routes of the kernel go to `kernel` ([`KernelRoutes`] is the other end).
    pub fn new(tables: impl Into<ReconcileTables>, kernel: UnboundedSender<KernelUpdate>) -> Self {
        let tables = tables.into();
        Self {
            endpoints: Endpoints::new(tables.endpoints),
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
            addresses: BTreeMap::new(),
            synced: false,
            pods_loaded: false,
            audit: Audit::Endpoints,
        }
    }

    /// Reads what is in the tables. To be called once, before anything else.
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

    /// Takes in everything that `changes` names.
    pub fn changed(&mut self, store: &Store, changes: &Changes) {
        self.nodes_changed(store, changes.nodes.iter().map(String::as_str));
        self.routes.service_cidrs_changed(store, &changes.service_cidrs);
        self.services_changed(store, &changes.services);
        if changes.synced {
            self.synced();
        }
        self.revision = store.revision();
    }

    /// Nodes that came, went or changed. This node among them means that every other is looked at again.
    fn nodes_changed<'a>(&mut self, store: &Store, names: impl IntoIterator<Item = &'a str>) {
        self.routes.nodes_changed(store, names);
    }

    /// Services that came, went or changed, or one of whose slices did.
    fn services_changed<'a>(&mut self, store: &Store, names: impl IntoIterator<Item = &'a NamespacedName>) {
        // all addresses are looked at only if one of them changed: most changes are of endpoints
        let had_node_ports = self.services.has_node_ports();
        let mut moved = false;
        for name in names {
            let service = store.service(name);
            let entries = service.map(|service| {
                compile::services::compile(service, store.slices_of(name), &self.node_context)
            });
            let external = service.into_iter().flat_map(|service| {
                service.external_ips.iter().chain(&service.load_balancer_ips).map(|ip| Addr::from(*ip))
            });
            moved |= self.at(name, external.collect());
            self.services.set(name, entries);
        }
        if moved || had_node_ports != self.services.has_node_ports() {
            self.tell_frontends();
        }
    }

    /// The frontends of a service, or of a pod, are at these addresses, some of which may be the host's. Whether they were
    /// elsewhere.
    fn at(&mut self, name: &NamespacedName, addresses: BTreeSet<Addr>) -> bool {
        if addresses.is_empty() {
            return self.addresses.remove(name).is_some();
        }
        let moved = self.addresses.get(name) != Some(&addresses);
        if moved {
            self.addresses.insert(name.clone(), addresses);
        }
        moved
    }

    /// What this node reaches others with, at start and whenever it changes: all routes are made anew.
    pub fn set_network(&mut self, network: NodeNetwork, store: &Store) {
        let labels = store.node(&network.own).map(|node| &node.labels);
        let zone = labels.and_then(|labels| labels.get(ZONE)).map(|zone| zone.as_str().into());
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

    /// Services that were looked at are looked at again if the node is another one to them.
    fn set_node_context(&mut self, node_context: NodeContext, store: &Store) {
        if node_context != self.node_context {
            self.node_context = node_context;
            let names = store.services().map(|service| &service.name);
            let known: Vec<_> = names.filter(|name| self.services.is_known(name)).cloned().collect();
            self.services_changed(store, &known);
        }
    }

    /// Every address of this host on any device, link-local and loopback ones left out.
    pub fn set_host_addresses(
        &mut self,
        addresses: impl IntoIterator<Item = IpAddr>,
        store: &Store,
        now: Instant,
    ) {
        self.endpoints.set_host(addresses);
        let host = self.endpoints.host_addresses().map(Addr::from).collect();
        self.set_node_context(NodeContext { host, ..self.node_context.clone() }, store);
        let names: BTreeSet<_> = self.endpoints.pods.values().filter_map(host_ports_name).collect();
        self.host_ports_changed(names, now);
    }

    /// Ports of the host that lead to pods or services, whether or not they are in the tables yet.
    pub fn host_ports(&self) -> HostPorts {
        HostPorts { ports: self.services.host_ports().collect(), complete: self.synced && self.pods_loaded }
    }

    /// Whether [`Self::host_ports`] may be others than when this was asked last.
    pub const fn take_host_ports_changed(&mut self) -> bool {
        std::mem::replace(&mut self.services.host_ports_changed, false)
    }

    /// Prefixes that hold all cluster IPs, IPv4 and IPv6.
    pub fn cluster_ranges(&self) -> [ClusterRange; 2] {
        self.services.cluster_ranges()
    }

    /// Addresses of this host that take node ports; `None`: all.
    pub fn set_node_port_addresses(&mut self, addresses: Option<BTreeSet<IpAddr>>) {
        let addresses = addresses.map(|addresses| addresses.into_iter().map(Addr::from).collect());
        self.endpoints.set_node_port_addresses(addresses);
    }

    /// A pod of this node, at once. After an error it stays wanted and is tried again until [`Self::remove_pod`].
    ///
    /// `id` names the attachment (container and interface).
    pub fn upsert_pod(&mut self, id: &str, pod: &LocalPod, now: Instant) -> Result<(), EndpointError> {
        let before = self.endpoints.pods.get(id).and_then(host_ports_name);
        let done = self.endpoints.upsert_pod(id, pod, now);
        self.routes.set_pod(id, self.endpoints.pods.get(id).map(|pod| &pod.device));
        self.host_ports_changed(before.into_iter().chain(host_ports_name(pod)), now);
        done
    }

    /// The pod is gone, at once. After an error its entries are removed later.
    pub fn remove_pod(&mut self, id: &str, now: Instant) -> Result<(), EndpointError> {
        self.routes.set_pod(id, None);
        let name = self.endpoints.pods.get(id).and_then(host_ports_name);
        let done = self.endpoints.remove_pod(id, now);
        self.host_ports_changed(name, now);
        done
    }

    /// Ports of the host that lead to pods of these names came, went or changed: at once, as the pods did.
    fn host_ports_changed(&mut self, names: impl IntoIterator<Item = NamespacedName>, now: Instant) {
        for name in names {
            // of two pods of one name, one is on its way out
            let mut pods = self.endpoints.pods.values();
            let pod = pods.rfind(|pod| host_ports_name(pod).as_ref() == Some(&name));
            let entries = pod.and_then(|pod| {
                let addresses = &pod.device.addresses;
                let host = self.endpoints.host_addresses();
                compile::host_ports::compile(&name, &pod.port_mappings, addresses, host)
            });
            let ports = entries.iter().flat_map(|entries| &entries.ports);
            let addresses = ports.flat_map(PortEntries::frontends).map(|key| key.addr).collect();
            self.at(&name, addresses);
            self.services.set_now(&name, entries, now);
        }
        self.tell_frontends();
        self.endpoints.apply_host(now);
    }

    fn tell_frontends(&mut self) {
        self.endpoints.set_asked(Asked {
            frontends: self.addresses.values().flatten().copied().collect(),
            node_ports: self.services.has_node_ports(),
            complete: self.synced && self.pods_loaded,
        });
    }

    /// Every pod of this node has been given to [`Self::upsert_pod`]: others do not exist.
    pub fn pods_loaded(&mut self) {
        self.pods_loaded = true;
        self.tell_frontends();
        self.endpoints.sweep_pods();
        self.routes.sweep_kernel(KernelSweep::Pods);
        self.sweep_services();
    }

    /// The source has delivered everything: what is not wanted by now does not exist.
    fn synced(&mut self) {
        self.endpoints.sweep_host();
        self.routes.sweep();
        self.routes.sweep_kernel(KernelSweep::Nodes);
        self.synced = true;
        self.tell_frontends();
        self.services.complete();
        self.sweep_services();
    }

    /// Frontends come from the source and from the pods of this node.
    fn sweep_services(&mut self) {
        if self.synced && self.pods_loaded {
            self.services.host_ports_changed = true;
            self.services.sweep();
        }
    }

    /// Does what is due, up to a limit. Returns when to be called again: now, if there is more; `None` if there is
    /// nothing to do until an input changes.
    pub fn work(&mut self, now: Instant) -> Option<Instant> {
        let enough = self.changes() + WRITES;
        let mut keys = 0..KEYS;
        while self.changes() < enough && keys.next().is_some() {
            let worked =
                self.endpoints.work_one(now) || self.routes.work_one(now) || self.services.work_one(now);
            if !worked {
                self.services.look();
                break;
            }
        }
        if self.is_settled() {
            self.applied = self.revision;
        }
        self.next_due(now)
    }

    /// Compares the next table with what was written to it; what differs is repaired by later [`Self::work`]. Returns
    /// whether every table has had its turn. To be called by timer.
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

    /// UDP backends that came and went since this was asked last, in this order.
    pub fn take_moved(&mut self) -> Vec<SocketUpdate> {
        self.services.backends.take_moved()
    }

    /// All UDP backends there are.
    pub fn udp_backends(&self) -> SocketUpdate {
        SocketUpdate::Only(self.services.backends.udp().collect())
    }

    /// Whether any other node is reached through the overlay, as far as the table holds it.
    pub fn uses_overlay(&self) -> bool {
        self.routes.actual.values().any(|route| route.kind() == Some(RouteKind::Overlay))
    }

    /// Whether a pod's entries are in the table; what is not, in a sentence.
    pub fn check_pod(&self, id: &str) -> Result<(), String> {
        self.endpoints.check_pod(id)
    }

    /// Everything is as it is wanted.
    pub fn is_settled(&self) -> bool {
        self.endpoints.is_settled() && self.routes.is_settled() && self.services.is_settled()
    }

    /// Revision of the state that is in the tables completely.
    pub const fn applied_revision(&self) -> u64 {
        self.applied
    }

    /// Entries written or removed since the agent started.
    pub fn changes(&self) -> u64 {
        self.endpoints.changes() + self.routes.changes() + self.services.changes()
    }
}
