//! The reconciler over in-memory tables that check every write ([`check`]), with faults and
//! restarts.

mod check;
mod endpoints;
mod frontends;
mod property;
mod repair;
mod restarts;
mod routes;
mod services;
mod views;
mod writes;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use dataplane_common::abi::{
    Addr, BackendSlot, Endpoint, MacAddr, PodSource, Route, Scope, Service, ServiceFlags, ServiceKey,
    names::capacity,
};
use ipnet::IpNet;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use self::check::{Checked, Checker};
use super::{
    InstalledRoutes, KernelUpdate, LocalPod, NodeNetwork, ReconcileTables, Reconciler, slots::QUARANTINE,
};
use crate::{
    compile::{
        endpoints::PodDevice,
        routes::{Overlay, RoutingMode},
    },
    datapath::{
        table::{RoutePrefix, SourcePrefix, Table},
        testing::{Faults, FaultyTable, MemoryTable},
    },
    netlink::{KernelRoute, Uplink},
    state::{
        Changes, Endpoint as StateEndpoint, EndpointPort, EndpointSlice, Forwarding, LoadBalancing,
        NamespacedName, Node, Object, ObjectKey, Owner, Service as StateService, ServiceCidr, ServicePort,
        SourceEvent, Store, TrafficPolicy, TransportProtocol,
    },
};

/// Capacities of the tables.
#[derive(Clone, Copy, Debug)]
struct Capacities {
    frontends: u32,
    slots: u32,
    backends: u32,
    source_ranges: u32,
}

const LARGE: Capacities = Capacities { frontends: 4_096, slots: 65_536, backends: 32_768, source_ranges: 64 };

/// The tables and the reconciler.
struct Fixture {
    endpoints: MemoryTable<Addr, Endpoint>,
    pod_sources: MemoryTable<u32, PodSource>,
    routes: MemoryTable<RoutePrefix, Route>,
    services: MemoryTable<ServiceKey, Service>,
    backends: MemoryTable<u32, BackendSlot>,
    generations: MemoryTable<u32, u32>,
    source_ranges: MemoryTable<SourcePrefix, u32>,
    faults: Faults,
    checker: Arc<Mutex<Checker>>,
    store: Store,
    now: Instant,
    reconciler: Reconciler,
    kernel: UnboundedReceiver<KernelUpdate>,
    kernel_routes: BTreeMap<IpNet, KernelRoute>,
}

impl Fixture {
    /// A reconciler over empty tables.
    fn new(capacities: Capacities) -> Self {
        let services = MemoryTable::hash("SERVICES", capacities.frontends);
        let backends = MemoryTable::array("BACKENDS", capacities.slots);
        let generations = MemoryTable::array("BACKEND_GENERATIONS", capacities.backends);
        let source_ranges = MemoryTable::hash("SOURCE_RANGES", capacities.source_ranges);
        let now = Instant::now();
        let checker = Checker::new(services.clone(), backends.clone(), generations.clone(), now);
        let endpoints = MemoryTable::hash("ENDPOINTS", 64);
        let pod_sources = MemoryTable::array("POD_SOURCES", capacity::POD_SOURCES);
        let routes = MemoryTable::hash("ROUTES", 64);
        let faults = Faults::default();
        let (sender, kernel) = mpsc::unbounded_channel();
        let checker = Arc::new(Mutex::new(checker));
        let mut fixture = Self {
            reconciler: Reconciler::new(
                tables(
                    &endpoints,
                    &pod_sources,
                    &routes,
                    &services,
                    &backends,
                    &generations,
                    &source_ranges,
                    &faults,
                    &checker,
                ),
                sender,
            ),
            endpoints,
            pod_sources,
            routes,
            services,
            backends,
            generations,
            source_ranges,
            faults,
            checker,
            store: Store::default(),
            now,
            kernel,
            kernel_routes: BTreeMap::new(),
        };
        fixture.reconciler.adopt().unwrap();
        fixture
    }

    /// Replaces the reconciler, which adopts the tables. It starts later than any program runs.
    fn restart(&mut self) {
        self.advance(QUARANTINE);
        self.faults.clear();
        let (sender, kernel) = mpsc::unbounded_channel();
        let tables = tables(
            &self.endpoints,
            &self.pod_sources,
            &self.routes,
            &self.services,
            &self.backends,
            &self.generations,
            &self.source_ranges,
            &self.faults,
            &self.checker,
        );
        self.reconciler = Reconciler::new(tables, sender);
        self.kernel = kernel;
        self.kernel_routes.clear();
        self.reconciler.adopt().unwrap();
    }

    /// Delivers all objects to the new reconciler.
    fn replay(&mut self) {
        let changes = Changes {
            nodes: self.store.nodes().map(|node| node.name.clone()).collect(),
            services: self.store.services().map(|service| service.name.clone()).collect(),
            synced: true,
            ..Changes::default()
        };
        self.apply_changes(&changes);
    }

    fn apply(&mut self, events: impl IntoIterator<Item = SourceEvent>) {
        let mut changes = Changes::default();
        for event in events {
            changes.merge(self.store.apply(event));
        }
        self.apply_changes(&changes);
    }

    fn apply_changes(&mut self, changes: &Changes) {
        self.checker.lock().unwrap().expect(&self.store);
        self.reconciler.apply_changes(&self.store, changes);
    }

    fn advance(&mut self, time: Duration) {
        self.now += time;
        self.checker.lock().unwrap().now = self.now;
    }

    fn work(&mut self) -> Option<Instant> {
        let due = self.reconciler.work(self.now);
        while let Ok(update) = self.kernel.try_recv() {
            match update {
                KernelUpdate::Ensure(route) => drop(self.kernel_routes.insert(route.destination, route)),
                KernelUpdate::Remove(destination) => drop(self.kernel_routes.remove(&destination)),
                KernelUpdate::Sweep(_) => {}
            }
        }
        due
    }

    /// Works until nothing is due.
    fn settle(&mut self) {
        for _ in 0..1_000 {
            let Some(due) = self.work() else { break };
            self.advance(due.saturating_duration_since(self.now));
        }
        assert!(self.reconciler.is_settled(), "{:#?}", self.reconciler.problems());
    }

    /// Number of writes to all tables.
    fn writes(&self) -> u64 {
        self.endpoints.writes()
            + self.pod_sources.writes()
            + self.routes.writes()
            + self.services.writes()
            + self.backends.writes()
            + self.generations.writes()
    }

    fn problems(&self) -> Vec<String> {
        self.reconciler.problems().into_iter().map(|p| format!("{}: {}", p.subject, p.message)).collect()
    }

    /// Backends of a frontend, as a reader sees them.
    fn backends_of(&self, frontend: &ServiceKey) -> Option<Vec<String>> {
        let row = self.services.get(frontend).unwrap()?;
        let slots =
            (row.first_slot..row.first_slot + row.count).map(|i| self.backends.get(&i).unwrap().unwrap());
        let mut backends: Vec<_> = slots.map(|slot| format!("{}:{}", slot.addr, slot.port)).collect();
        // ordered by ID, which has no meaning
        if row.flags & ServiceFlags::HASH == 0 {
            backends.sort();
        }
        Some(backends)
    }
}

#[expect(clippy::too_many_arguments, reason = "one for each table")]
fn tables(
    endpoints: &MemoryTable<Addr, Endpoint>,
    pod_sources: &MemoryTable<u32, PodSource>,
    routes: &MemoryTable<RoutePrefix, Route>,
    services: &MemoryTable<ServiceKey, Service>,
    backends: &MemoryTable<u32, BackendSlot>,
    generations: &MemoryTable<u32, u32>,
    source_ranges: &MemoryTable<SourcePrefix, u32>,
    faults: &Faults,
    checker: &Arc<Mutex<Checker>>,
) -> ReconcileTables {
    ReconcileTables {
        endpoints: Box::new(FaultyTable::new(endpoints.clone(), faults.clone())),
        pod_sources: Box::new(FaultyTable::new(pod_sources.clone(), faults.clone())),
        routes: Box::new(FaultyTable::new(routes.clone(), faults.clone())),
        services: Box::new(FaultyTable::new(Checked::new(services.clone(), checker), faults.clone())),
        backends: Box::new(FaultyTable::new(Checked::new(backends.clone(), checker), faults.clone())),
        backend_generations: Box::new(FaultyTable::new(
            Checked::new(generations.clone(), checker),
            faults.clone(),
        )),
        source_ranges: Box::new(FaultyTable::new(source_ranges.clone(), faults.clone())),
    }
}

fn name(name: &str) -> NamespacedName {
    NamespacedName::new("default", name)
}

/// A Service with these cluster IPs and port 53 for TCP and UDP.
fn service(service: &str, ips: &[&str]) -> StateService {
    let port = |name: &str, protocol| ServicePort { name: name.into(), port: 53, protocol, node_port: None };
    StateService {
        name: name(service),
        owner: Owner::default(),
        cluster_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: vec![port("tcp", TransportProtocol::Tcp), port("udp", TransportProtocol::Udp)],
        affinity_timeout: None,
        load_balancing: None,
        forwarding: None,
        ..StateService::default()
    }
}

/// The only slice of a Service.
fn slice(service: &str, addresses: impl IntoIterator<Item = String>) -> EndpointSlice {
    let port = |name: &str, protocol| EndpointPort { name: name.into(), port: 5_300, protocol };
    let endpoint = |address: String| StateEndpoint {
        address: address.parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        node_name: None,
        hints: None,
    };
    EndpointSlice {
        name: name(service),
        owner: Owner::default(),
        service: name(service),
        ports: vec![port("tcp", TransportProtocol::Tcp), port("udp", TransportProtocol::Udp)],
        endpoints: addresses.into_iter().map(endpoint).collect(),
        trigger_time: None,
    }
}

fn upsert(object: impl Into<Object>) -> SourceEvent {
    SourceEvent::Upsert(object.into())
}

fn removed(key: ObjectKey) -> SourceEvent {
    SourceEvent::Remove(key, Owner::default())
}

fn service_removed(service: &str) -> SourceEvent {
    removed(ObjectKey::Service(name(service)))
}

impl From<StateService> for Object {
    fn from(service: StateService) -> Self {
        Self::Service(service)
    }
}

impl From<EndpointSlice> for Object {
    fn from(slice: EndpointSlice) -> Self {
        Self::EndpointSlice(slice)
    }
}

impl From<Node> for Object {
    fn from(node: Node) -> Self {
        Self::Node(node)
    }
}

fn frontend(ip: &str, protocol: TransportProtocol) -> ServiceKey {
    let addr = ip.parse::<std::net::IpAddr>().unwrap().into();
    ServiceKey {
        addr,
        port: dataplane_common::abi::Port::new(53),
        protocol: protocol.number(),
        scope: Scope::Any as u8,
    }
}

fn node(node: &str, ips: &[&str], cidrs: &[&str]) -> Node {
    Node {
        name: node.to_owned(),
        owner: Owner::default(),
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        internal_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ..Node::default()
    }
}

/// This node is `a`; nodes in 192.168.1.0/24 are neighbours.
fn network() -> NodeNetwork {
    NodeNetwork {
        own: "a".to_owned(),
        uplinks: vec![Uplink {
            name: "eth0".to_owned(),
            ifindex: 2,
            mtu: 1_500,
            mac: Some(MacAddr::new([2, 0, 0, 0, 0, 1])),
            addresses: vec!["192.168.1.1/24".parse().unwrap(), "fd00::1/64".parse().unwrap()],
            sources: Vec::new(),
            bridge: false,
        }],
        mode: RoutingMode::Auto,
        overlay: Some(Overlay { ifindex: 9, mtu: 1_450 }),
        overlay_device: "dataplane0".to_owned(),
        exceptions: vec!["172.16.0.0/12".parse().unwrap()],
        sources: Vec::new(),
        load_balancing: LoadBalancing::Random,
        forwarding: Forwarding::Snat,
    }
}

fn pod(pod: &str, ip: &str, ifindex: u32) -> LocalPod {
    LocalPod {
        namespace: "default".to_owned(),
        name: pod.to_owned(),
        device_name: format!("dp{ifindex}"),
        device: PodDevice {
            addresses: vec![ip.parse().unwrap()],
            ifindex,
            mac: MacAddr::new([2, 0, 0, 0, 1, ifindex as u8]),
            shaped: false,
            down: false,
        },
        port_mappings: Vec::new(),
    }
}
