//! `ROUTES`, and what the kernel's own routes should be.
//!
//! A prefix may be wanted twice (a node's range that is an exception too): what is on this node comes before what is on
//! others, that before ranges of cluster IPs, and those before exceptions. FlowHints are the datapath's, as in `ENDPOINTS`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::Instant,
};

use dataplane_common::abi::Route;
use ipnet::IpNet;
use tokio::sync::mpsc::UnboundedSender;

use super::{
    backoff::WorkQueue,
    claims::Claims,
    instrumented::InstrumentedTable,
    kernel_routes::{KernelSweep, KernelUpdate},
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

/// What this node reaches others with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeNetwork {
    /// Name of this node.
    pub own: String,
    pub uplinks: Vec<Uplink>,
    pub mode: RoutingMode,
    pub overlay: Option<Overlay>,
    /// Name of the overlay device, for people.
    pub overlay_device: String,
    /// Destinations outside the cluster that are not masqueraded.
    pub exceptions: Vec<IpNet>,
    /// The addresses the node speaks to its pods with, at most one per family: as the CNI server has them, so that a
    /// route it made is the one that is wanted.
    pub sources: Vec<IpAddr>,
    /// Of services that do not choose.
    pub load_balancing: LoadBalancing,
    /// Of services that do not choose.
    pub forwarding: Forwarding,
}

/// Who wants a route, in the order of precedence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Claimant {
    Own,
    Pod(String),
    Node(String),
    /// The name of a `ServiceCIDR`.
    Services(String),
    Exceptions,
}

/// Wanted and actual entries.
#[derive(Debug)]
pub(super) struct Routes {
    pub(super) table: InstrumentedTable<RoutePrefix, Route>,
    /// Without gates.
    pub(super) actual: HashMap<RoutePrefix, Route>,
    claims: Claims<RoutePrefix, Claimant, Route>,
    pub(super) queue: WorkQueue<RoutePrefix>,
    pub(super) network: Option<NodeNetwork>,
    /// This node as last heard: routes stay if its object goes.
    own: Option<Node>,
    /// Of other nodes.
    pub(super) problems: BTreeMap<String, Vec<Problem>>,
    kernel_claims: Claims<IpNet, Claimant, KernelRoute>,
    kernel: UnboundedSender<KernelUpdate>,
}

impl Routes {
    pub(super) fn new(
        table: Box<dyn Table<RoutePrefix, Route>>,
        kernel: UnboundedSender<KernelUpdate>,
    ) -> Self {
        Self {
            table: InstrumentedTable::new(table),
            actual: HashMap::new(),
            claims: Claims::default(),
            queue: WorkQueue::default(),
            network: None,
            own: None,
            problems: BTreeMap::new(),
            kernel_claims: Claims::default(),
            kernel,
        }
    }

    pub(super) fn adopt(&mut self) -> Result<usize, TableError> {
        self.actual = self.found()?;
        Ok(self.actual.len())
    }

    pub(super) fn set_network(&mut self, network: NodeNetwork, store: &Store) {
        if self.network.as_ref() == Some(&network) {
            return;
        }
        let exceptions = routes::exceptions(&network.exceptions);
        self.claim(&Claimant::Exceptions, exceptions);
        self.network = Some(network);
        self.compile_all(store);
    }

    pub(super) fn nodes_changed<'a>(&mut self, store: &Store, names: impl IntoIterator<Item = &'a str>) {
        let names: BTreeSet<_> = names.into_iter().collect();
        let Some(network) = &self.network else { return };
        let own = store.node(&network.own);
        // its labels or annotations say nothing to us
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

    /// Ranges of cluster IPs that came, went or changed.
    pub(super) fn service_cidrs_changed(&mut self, store: &Store, names: &BTreeSet<String>) {
        for name in names {
            let cidrs = store.service_cidr(name).map_or(&[][..], |range| &range.cidrs);
            self.claim(&Claimant::Services(name.clone()), routes::services(cidrs));
        }
    }

    fn compile_all(&mut self, store: &Store) {
        let Some(network) = &self.network else { return };
        if let Some(own) = store.node(&network.own) {
            self.own = Some(own.clone());
            self.claim(&Claimant::Own, routes::own(own));
        }
        for node in store.nodes() {
            self.compile(&node.name, store);
        }
    }

    /// Without this node's own object, no way to another can be told.
    fn compile(&mut self, name: &str, store: &Store) {
        let (Some(network), Some(own)) = (&self.network, &self.own) else { return };
        if network.own == name {
            return;
        }
        let via =
            routes::Network { own, uplinks: &network.uplinks, mode: network.mode, overlay: network.overlay };
        let NodeRoutes { datapath, kernel, problems } =
            store.node(name).map(|node| routes::remote(node, &via)).unwrap_or_default();
        let claimant = Claimant::Node(name.to_owned());
        self.claim(&claimant, datapath);
        self.claim_kernel(&claimant, kernel);
        if problems.is_empty() {
            self.problems.remove(name);
        } else {
            self.problems.insert(name.to_owned(), problems);
        }
    }

    /// The host reaches its pods by a route to each address.
    pub(super) fn set_pod(&mut self, id: &str, device: Option<&PodDevice>) {
        let sources = self.network.as_ref().map_or(&[][..], |network| &network.sources);
        let routes = device.iter().flat_map(|device| {
            device.addresses.iter().map(|ip| KernelRoute::to_pod(*ip, device.ifindex, sources))
        });
        let routes: Vec<_> = routes.collect();
        self.claim_kernel(&Claimant::Pod(id.to_owned()), routes);
    }

    fn claim(&mut self, claimant: &Claimant, entries: Vec<(RoutePrefix, Route)>) {
        for prefix in self.claims.set(claimant, entries) {
            self.queue.push(prefix);
        }
    }

    fn claim_kernel(&mut self, claimant: &Claimant, routes: Vec<KernelRoute>) {
        let entries = routes.into_iter().map(|route| (route.destination.trunc(), route));
        for destination in self.kernel_claims.set(claimant, entries) {
            let update = match self.kernel_claims.winner(&destination) {
                Some((_, route)) => KernelUpdate::Want(*route),
                None => KernelUpdate::Unwant(destination),
            };
            self.tell_kernel(update);
        }
    }

    pub(super) fn sweep_kernel(&self, sweep: KernelSweep) {
        self.tell_kernel(KernelUpdate::Sweep(sweep));
    }

    fn tell_kernel(&self, update: KernelUpdate) {
        // nobody listens: the agent is stopping, and routes stay as they are
        let _stopping = self.kernel.send(update);
    }

    /// Prefixes nobody wants do not exist.
    pub(super) fn sweep(&mut self) {
        for prefix in self.actual.keys() {
            if self.claims.winner(prefix).is_none() {
                self.queue.push(*prefix);
            }
        }
    }

    /// Works on one key that is due. `false`: there is none.
    pub(super) fn work_one(&mut self, now: Instant) -> bool {
        let Some(prefix) = self.queue.pop(now) else { return false };
        match self.apply(&prefix) {
            Ok(()) => self.queue.settle(&prefix),
            Err(error) => self.queue.fail(prefix, error.to_string(), now),
        }
        true
    }

    fn apply(&mut self, prefix: &RoutePrefix) -> Result<(), TableError> {
        let actual = self.actual.get(prefix);
        match self.claims.winner(prefix) {
            Some((_, wanted)) if actual == Some(wanted) => {}
            Some((_, wanted)) => {
                let entry = if actual.is_some() { wanted.with_all_flow_hints() } else { *wanted };
                self.table.insert(prefix, &entry)?;
                self.actual.insert(*prefix, *wanted);
            }
            None if actual.is_some() => {
                self.table.remove(prefix)?;
                self.actual.remove(prefix);
            }
            None => {}
        }
        Ok(())
    }

    /// What is in the table, without gates.
    fn found(&self) -> Result<HashMap<RoutePrefix, Route>, TableError> {
        let entries = self.table.entries()?.into_iter();
        Ok(entries.map(|(prefix, route)| (prefix, route.without_flow_hints())).collect())
    }

    /// Compares with what is in the table; differences are repaired by later work. Returns how many there are.
    pub(super) fn audit(&mut self) -> Result<u64, TableError> {
        let found = self.found()?;
        let mut different: BTreeSet<RoutePrefix> = BTreeSet::new();
        different.extend(found.iter().filter(|(p, r)| self.actual.get(p) != Some(r)).map(|(p, _)| *p));
        different.extend(self.actual.keys().filter(|prefix| !found.contains_key(prefix)));
        self.actual = found;
        for prefix in &different {
            self.queue.push(*prefix);
        }
        Ok(different.len() as u64)
    }

    /// Name of the other node a prefix belongs to.
    pub(super) fn node_of(&self, prefix: &RoutePrefix) -> Option<&str> {
        match self.claims.winner(prefix)? {
            (Claimant::Node(name), _) => Some(name),
            (Claimant::Own, _) => self.own.as_ref().map(|own| own.name.as_str()),
            _ => None,
        }
    }

    /// Name of this node, if there is no object of it.
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
