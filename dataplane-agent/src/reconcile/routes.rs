//! Reconciles `ROUTES`, and computes the desired kernel routes.
//!
//! A prefix may have several owners, such as a node's pod CIDR that is also an exception.
//! Precedence: this node, its pods, other nodes, ServiceCIDRs, exceptions. Flow hints belong to the
//! datapath, as in `ENDPOINTS`.
//!
//! A packet of the host to a Service is routed by the kernel's route to the backend where the row
//! says native (`bpf_redirect_neigh` looks it up), and without it where the row says overlay. A
//! node that changes from one to the other therefore gets its kernel route first for native
//! routing, and its row first for the overlay.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::{Duration, Instant},
};

use dataplane_common::abi::{Route, RouteKind};
use ipnet::IpNet;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    backoff::WorkQueue,
    instrumented::InstrumentedTable,
    kernel_routes::{InstalledRoutes, KernelSweep, KernelUpdate},
    owners::KeyOwners,
};
use crate::{
    compile::{
        endpoints::PodDevice,
        routes::{self, NodeRoutes, Overlay, Problem, RoutingMode},
    },
    datapath::table::{RoutePrefix, Table, TableError},
    netlink::{KernelRoute, Uplink},
    state::{Forwarding, LoadBalancing, Node, Store},
};

/// How often a row that waits for its kernel route is tried, and for how long: packets of pods do
/// not need that route.
const KERNEL_ROUTE_INTERVAL: Duration = Duration::from_millis(1);
const KERNEL_ROUTE_TIMEOUT: Duration = Duration::from_secs(2);

/// The network of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeNetwork {
    /// Name of this node.
    pub own: String,
    pub uplinks: Vec<Uplink>,
    pub mode: RoutingMode,
    pub overlay: Option<Overlay>,
    /// Name of the overlay device, for the API.
    pub overlay_device: String,
    /// Destinations outside the cluster that are not masqueraded.
    pub exceptions: Vec<IpNet>,
    /// Source addresses for traffic to local pods, at most one per family. The same as in the CNI
    /// server, so that a route made by an ADD is the desired one.
    pub sources: Vec<IpAddr>,
    /// Default for Services without the annotation.
    pub load_balancing: LoadBalancing,
    /// Default for Services without the annotation.
    pub forwarding: Forwarding,
}

/// The owners of routes, in order of precedence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RouteOwner {
    ThisNode,
    Pod(String),
    Node(String),
    /// By name.
    ServiceCidr(String),
    Exceptions,
}

/// Desired and actual entries.
#[derive(Debug)]
pub(super) struct Routes {
    pub(super) table: InstrumentedTable<RoutePrefix, Route>,
    /// Without flow hints.
    pub(super) actual: HashMap<RoutePrefix, Route>,
    owners: KeyOwners<RoutePrefix, RouteOwner, Route>,
    pub(super) queue: WorkQueue<RoutePrefix>,
    pub(super) network: Option<NodeNetwork>,
    /// This node's last known object: routes stay if the object is deleted.
    own: Option<Node>,
    /// Problems of other nodes, by name.
    pub(super) problems: BTreeMap<String, Vec<Problem>>,
    kernel_owners: KeyOwners<IpNet, RouteOwner, KernelRoute>,
    kernel: UnboundedSender<KernelUpdate>,
    /// `None`: unknown; then no row waits.
    pub(super) installed: Option<InstalledRoutes>,
    /// Rows that wait for their kernel route, since when.
    waiting: HashMap<RoutePrefix, Instant>,
    /// Rows whose kernel route is sent after them.
    kernel_after: BTreeSet<RoutePrefix>,
    /// Sweeps to send when no kernel route is held back: they remove every route that was not sent.
    sweeps_after: Vec<KernelSweep>,
}

impl Routes {
    pub(super) fn new(
        table: Box<dyn Table<RoutePrefix, Route>>,
        kernel: UnboundedSender<KernelUpdate>,
    ) -> Self {
        Self {
            table: InstrumentedTable::new(table),
            actual: HashMap::new(),
            owners: KeyOwners::default(),
            queue: WorkQueue::default(),
            network: None,
            own: None,
            problems: BTreeMap::new(),
            kernel_owners: KeyOwners::default(),
            kernel,
            installed: None,
            waiting: HashMap::new(),
            kernel_after: BTreeSet::new(),
            sweeps_after: Vec::new(),
        }
    }

    pub(super) fn adopt(&mut self) -> Result<usize, TableError> {
        self.actual = self.read_table()?;
        Ok(self.actual.len())
    }

    pub(super) fn set_network(&mut self, network: NodeNetwork, store: &Store) {
        if self.network.as_ref() == Some(&network) {
            return;
        }
        let exceptions = routes::exceptions(&network.exceptions);
        self.set_routes(&RouteOwner::Exceptions, exceptions);
        self.network = Some(network);
        self.compile_all(store);
        self.service_cidrs_changed(store, &store.everything().service_cidrs);
    }

    pub(super) fn nodes_changed<'a>(&mut self, store: &Store, names: impl IntoIterator<Item = &'a str>) {
        let names: BTreeSet<_> = names.into_iter().collect();
        let Some(network) = &self.network else { return };
        let own = store.node(&network.own);
        // its labels and taints do not affect routes
        let own_changed = own.is_some_and(|node| {
            self.own.as_ref().is_none_or(|known| {
                (&known.pod_cidrs, &known.internal_ips) != (&node.pod_cidrs, &node.internal_ips)
            })
        });
        if own_changed {
            self.compile_all(store);
        } else {
            for name in names {
                self.compile(name, store);
            }
        }
    }

    /// Compiles added, changed and removed ServiceCIDRs.
    pub(super) fn service_cidrs_changed(&mut self, store: &Store, names: &BTreeSet<String>) {
        for name in names {
            let cidrs = store.service_cidr(name).map_or(&[][..], |range| &range.cidrs);
            let owner = RouteOwner::ServiceCidr(name.clone());
            self.set_routes(&owner, routes::service_cidrs(cidrs));
            // not known before the network: then `set_network` sets them
            if let Some(network) = &self.network {
                let kernel = routes::to_service_cidrs(cidrs, &network.uplinks, &network.sources);
                self.set_kernel_routes(&owner, kernel);
            }
        }
    }

    fn compile_all(&mut self, store: &Store) {
        let Some(network) = &self.network else { return };
        if let Some(own) = store.node(&network.own) {
            self.own = Some(own.clone());
            self.set_routes(&RouteOwner::ThisNode, routes::local(own));
        }
        for node in store.nodes() {
            self.compile(&node.name, store);
        }
    }

    /// Compiles the routes to a node. Requires this node's own object.
    fn compile(&mut self, name: &str, store: &Store) {
        let (Some(network), Some(own)) = (&self.network, &self.own) else { return };
        if network.own == name {
            return;
        }
        let via =
            routes::Network { own, uplinks: &network.uplinks, mode: network.mode, overlay: network.overlay };
        let NodeRoutes { datapath, kernel, problems } =
            store.node(name).map(|node| routes::remote(node, &via)).unwrap_or_default();
        let owner = RouteOwner::Node(name.to_owned());
        self.set_routes(&owner, datapath);
        self.set_kernel_routes(&owner, kernel);
        if problems.is_empty() {
            self.problems.remove(name);
        } else {
            self.problems.insert(name.to_owned(), problems);
        }
    }

    /// Sets the kernel routes to the addresses of a local pod.
    pub(super) fn set_pod(&mut self, id: &str, device: Option<&PodDevice>) {
        let sources = self.network.as_ref().map_or(&[][..], |network| &network.sources);
        let routes = device.iter().flat_map(|device| {
            device.addresses.iter().map(|ip| KernelRoute::to_pod(*ip, device.ifindex, sources))
        });
        let routes: Vec<_> = routes.collect();
        self.set_kernel_routes(&RouteOwner::Pod(id.to_owned()), routes);
    }

    fn set_routes(&mut self, owner: &RouteOwner, entries: Vec<(RoutePrefix, Route)>) {
        for prefix in self.owners.set(owner, entries) {
            self.queue.push(prefix);
        }
    }

    fn set_kernel_routes(&mut self, owner: &RouteOwner, routes: Vec<KernelRoute>) {
        let entries = routes.into_iter().map(|route| (route.destination.trunc(), route));
        for destination in self.kernel_owners.set(owner, entries) {
            match routes::keys(&destination)
                .find(|key| self.is_to_change(key, RouteKind::Native, RouteKind::Overlay))
            {
                Some(key) => drop(self.kernel_after.insert(key)),
                None => self.send_kernel_route(destination),
            }
        }
    }

    /// Whether the row is to change from one kind to another.
    fn is_to_change(&self, prefix: &RoutePrefix, from: RouteKind, to: RouteKind) -> bool {
        let actual = self.actual.get(prefix).and_then(Route::kind);
        let desired = self.owners.effective(prefix).and_then(|(_, route)| route.kind());
        (actual, desired) == (Some(from), Some(to))
    }

    fn send_kernel_route(&self, destination: IpNet) {
        self.publish_kernel_route(match self.kernel_owners.effective(&destination) {
            Some((_, route)) => KernelUpdate::Ensure(*route),
            None => KernelUpdate::Remove(destination),
        });
    }

    pub(super) fn sweep_kernel(&mut self, sweep: KernelSweep) {
        if self.kernel_after.is_empty() {
            self.publish_kernel_route(KernelUpdate::Sweep(sweep));
        } else {
            self.sweeps_after.push(sweep);
        }
    }

    fn publish_kernel_route(&self, update: KernelUpdate) {
        // the receiver is gone: the agent is stopping, and routes stay
        let _stopping = self.kernel.send(update);
    }

    /// Removes prefixes without an owner.
    pub(super) fn sweep(&mut self) {
        for prefix in self.actual.keys() {
            if self.owners.effective(prefix).is_none() {
                self.queue.push(*prefix);
            }
        }
    }

    /// Reconciles one due key. Returns `false` if there is none.
    pub(super) fn work_one(&mut self, now: Instant) -> bool {
        let Some(prefix) = self.queue.pop(now) else { return false };
        if self.must_wait(&prefix, now) {
            let message = "waits for the kernel route".to_owned();
            self.queue.postpone(prefix, message, now + KERNEL_ROUTE_INTERVAL);
            return true;
        }
        self.waiting.remove(&prefix);
        match self.apply(&prefix) {
            Ok(()) => {
                self.queue.done(&prefix);
                if self.kernel_after.remove(&prefix)
                    && let Some(destination) = routes::network(&prefix)
                {
                    self.send_kernel_route(destination);
                    for sweep in std::mem::take(&mut self.sweeps_after) {
                        self.sweep_kernel(sweep);
                    }
                }
            }
            Err(error) => self.queue.fail(prefix, error.to_string(), now),
        }
        true
    }

    /// Whether the row must be written after its kernel route, which is not there yet.
    fn must_wait(&mut self, prefix: &RoutePrefix, now: Instant) -> bool {
        let Some(installed) = &self.installed else { return false };
        if !self.is_to_change(prefix, RouteKind::Overlay, RouteKind::Native) {
            return false;
        }
        // the kernel has its own routes to the addresses of nodes
        let route =
            routes::network(prefix).and_then(|destination| self.kernel_owners.effective(&destination));
        if route.is_none_or(|(_, route)| installed.contains(route)) {
            return false;
        }
        now < *self.waiting.entry(*prefix).or_insert(now) + KERNEL_ROUTE_TIMEOUT
    }

    fn apply(&mut self, prefix: &RoutePrefix) -> Result<(), TableError> {
        let actual = self.actual.get(prefix);
        match self.owners.effective(prefix) {
            Some((_, desired)) if actual == Some(desired) => {}
            Some((_, desired)) => {
                let entry = if actual.is_some() { desired.with_all_flow_hints() } else { *desired };
                self.table.insert(prefix, &entry)?;
                self.actual.insert(*prefix, *desired);
            }
            None if actual.is_some() => {
                self.table.remove(prefix)?;
                self.actual.remove(prefix);
            }
            None => {}
        }
        Ok(())
    }

    /// Reads the table, without flow hints.
    fn read_table(&self) -> Result<HashMap<RoutePrefix, Route>, TableError> {
        let entries = self.table.entries()?.into_iter();
        Ok(entries.map(|(prefix, route)| (prefix, route.without_flow_hints())).collect())
    }

    /// Compares the table with what was written; differences are repaired by later work. Returns
    /// their number.
    pub(super) fn audit(&mut self) -> Result<u64, TableError> {
        let read_table = self.read_table()?;
        let mut different: BTreeSet<RoutePrefix> = BTreeSet::new();
        different.extend(read_table.iter().filter(|(p, r)| self.actual.get(p) != Some(r)).map(|(p, _)| *p));
        different.extend(self.actual.keys().filter(|prefix| !read_table.contains_key(prefix)));
        self.actual = read_table;
        for prefix in &different {
            self.queue.push(*prefix);
        }
        Ok(different.len() as u64)
    }

    /// Name of the node that a prefix belongs to.
    pub(super) fn node_of(&self, prefix: &RoutePrefix) -> Option<&str> {
        match self.owners.effective(prefix)? {
            (RouteOwner::Node(name), _) => Some(name),
            (RouteOwner::ThisNode, _) => self.own.as_ref().map(|own| own.name.as_str()),
            _ => None,
        }
    }

    /// Name of this node if its object is missing.
    pub(super) fn missing_own(&self) -> Option<&str> {
        let network = self.network.as_ref().filter(|_| self.own.is_none())?;
        Some(&network.own)
    }

    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        self.queue.next_due(now)
    }

    pub(super) fn is_settled(&self) -> bool {
        self.queue.is_settled()
    }

    pub(super) const fn changes(&self) -> u64 {
        self.table.changes()
    }
}
