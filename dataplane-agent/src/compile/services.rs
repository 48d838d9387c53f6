//! A service and its endpoint slices → frontends, and the backends behind them.
//!
//! The result is sorted and free of duplicates, so that equal meaning is equal value: the reconciler writes nothing
//! when a slice is cut differently but says the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::{
    abi::{Addr, Port, Scope, ServiceFlags, ServiceKey},
    hash, maglev,
};
use ipnet::IpNet;

use crate::state::{
    Endpoint, EndpointSlice, Forwarding, Hints, LoadBalancing, Name, NamespacedName, Service, ServicePort,
    TrafficPolicy, TransportProtocol,
};

/// Slots of a Maglev table per backend: shares then differ by about one per cent.
const MAGLEV_SLOTS_PER_BACKEND: usize = 100;
/// Prime lengths of Maglev tables. A table grows by doubling, so that few changes of the number of backends make
/// another length, which would move most connections.
const MAGLEV_SIZES: [usize; 10] = [251, 509, 1_021, 2_039, 4_093, 8_191, 16_381, 32_749, 65_521, 131_071];
/// More slots than this are not spent for smoother shares alone.
const MAGLEV_SMOOTH: usize = 16_381;

/// Names a port of a service: what has a service id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortKey {
    pub service: NamespacedName,
    pub port: u16,
    pub protocol: TransportProtocol,
}

/// Where a connection may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    pub addr: Addr,
    pub port: Port,
}

/// What makes a service reachable from this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceEntries {
    pub ports: Vec<PortEntries>,
}

/// The entries of one port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortEntries {
    pub key: ServicePortKey,
    /// As the Service calls it.
    pub name: Name,
    /// Seconds, 0 without session affinity.
    pub affinity_timeout: u32,
    pub load_balancing: LoadBalancing,
    pub forwarding: Forwarding,
    /// Clients that may ask at frontends with [`ServiceFlags::SOURCE_RANGES`], sorted.
    pub source_ranges: Vec<IpNet>,
    /// Frontends with what they lead to: each frontend once, each list of backends once per family.
    pub groups: Vec<Group>,
    /// Of UDP: every endpoint that serves, whether or not new connections get it. Who talks to one goes on, whatever becomes
    /// of policies, hints and readiness to be chosen, as a TCP connection does (kube-proxy's `CleanStaleEntries`). Sorted.
    pub serving: Vec<Backend>,
}

/// Frontends of one family that lead to the same backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Sorted.
    pub frontends: Vec<Frontend>,
    /// Sorted.
    pub backends: Vec<Backend>,
}

/// Where a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Frontend {
    pub key: ServiceKey,
    /// Bits of [`ServiceFlags`], [`ServiceFlags::HASH`] left out: it is the port's.
    pub flags: u32,
}

/// What a node is to the services it serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeContext {
    pub node: String,
    /// The node's label `topology.kubernetes.io/zone`.
    pub zone: Option<Name>,
    /// Every address of the node.
    pub host: BTreeSet<Addr>,
    /// Of services that do not choose.
    pub load_balancing: LoadBalancing,
    /// Of services that do not choose.
    pub forwarding: Forwarding,
}

impl PortEntries {
    /// Whether it is a port, and not the service's addresses as such.
    pub const fn is_port(&self) -> bool {
        self.key.port != 0
    }

    /// Every frontend.
    pub fn frontends(&self) -> impl Iterator<Item = &ServiceKey> {
        self.groups.iter().flat_map(|group| &group.frontends).map(|frontend| &frontend.key)
    }

    /// Bits of [`ServiceFlags`] of all frontends.
    pub const fn flags(&self) -> u32 {
        match self.load_balancing {
            LoadBalancing::Random => 0,
            LoadBalancing::Maglev => ServiceFlags::HASH,
        }
    }

    /// The range a group needs in `BACKENDS`: the number of the backend in each slot, given the number of each backend.
    pub fn arrange(&self, backends: &[Backend], numbers: &[u32]) -> Vec<u32> {
        match self.load_balancing {
            // in their order, by which the datapath finds the one a client had
            LoadBalancing::Random => {
                let mut numbers = numbers.to_vec();
                numbers.sort_unstable();
                numbers
            }
            LoadBalancing::Maglev => {
                let table = maglev_table(backends);
                table.iter().filter_map(|index| numbers.get(*index as usize)).copied().collect()
            }
        }
    }

    /// Adds a frontend that leads to these backends.
    pub fn add(&mut self, frontend: Frontend, backends: &[Backend]) {
        let is_v4 = frontend.key.addr.is_v4();
        let same =
            |group: &&mut Group| group.frontends[0].key.addr.is_v4() == is_v4 && group.backends == backends;
        let group = match self.groups.iter_mut().find(same) {
            Some(group) => group,
            None => self.groups.push_mut(Group { frontends: Vec::new(), backends: backends.to_vec() }),
        };
        if let Err(place) = group.frontends.binary_search_by_key(&frontend.key, |known| known.key) {
            group.frontends.insert(place, frontend);
        }
    }
}

/// The entries of a service, on this node.
pub fn compile<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node_context: &NodeContext,
) -> ServiceEntries {
    let slices: Vec<_> = slices.into_iter().collect();
    let mut ports: Vec<_> =
        service.ports.iter().map(|port| port_entries(service, port, &slices, node_context)).collect();
    ports.sort_by(|a, b| a.key.cmp(&b.key));
    ports.dedup_by(|a, b| a.key == b.key);
    ports.push(addresses(service));
    // kept as long as the service, of which there are many: a list grown by one has room for four
    for port in &mut ports {
        port.groups.iter_mut().for_each(|group| group.frontends.shrink_to_fit());
        port.groups.shrink_to_fit();
    }
    ports.shrink_to_fit();
    ServiceEntries { ports }
}

/// The rows that say that the cluster IPs are the service's, whatever the port: a port of number 0.
fn addresses(service: &Service) -> PortEntries {
    let mut entries = PortEntries {
        key: ServicePortKey { service: service.name.clone(), port: 0, protocol: TransportProtocol::Tcp },
        name: Name::default(),
        affinity_timeout: 0,
        load_balancing: LoadBalancing::Random,
        forwarding: Forwarding::Snat,
        source_ranges: Vec::new(),
        groups: Vec::new(),
        serving: Vec::new(),
    };
    for ip in &service.cluster_ips {
        entries.add(Frontend { key: ServiceKey::of_address((*ip).into()), flags: 0 }, &[]);
    }
    entries
}

fn port_entries(
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    node_context: &NodeContext,
) -> PortEntries {
    let mut source_ranges = service.source_ranges.clone();
    source_ranges.sort_unstable();
    source_ranges.dedup();
    let (load_balancing, forwarding) = node_context.choices(service);
    let mut entries = PortEntries {
        key: ServicePortKey { service: service.name.clone(), port: port.port, protocol: port.protocol },
        name: port.name.clone(),
        affinity_timeout: service.affinity_timeout.unwrap_or(0),
        load_balancing,
        forwarding,
        source_ranges,
        groups: Vec::new(),
        serving: serving(port, slices),
    };
    for family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
        let usable = EligibleEndpoints::of(port, slices, family, node_context, forwarding);
        for frontend in frontends(service, port, family) {
            frontend.add_to(&mut entries, service, &usable, node_context);
        }
    }
    entries
}

/// Endpoints of a UDP port that serve, of both families.
fn serving(port: &ServicePort, slices: &[&EndpointSlice]) -> Vec<Backend> {
    if port.protocol != TransportProtocol::Udp {
        return Vec::new();
    }
    let all = behind(port, slices, |_| true);
    let serving = all.into_iter().filter(|(endpoint, _)| endpoint.serving).map(|(_, backend)| backend);
    serving.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Where clients ask for a port.
#[derive(Clone, Copy, Debug)]
enum Place {
    Cluster(IpAddr),
    External(IpAddr),
    LoadBalancer(IpAddr),
    /// Every address of the node of this one's family.
    Node(IpAddr, u16),
}

fn frontends(service: &Service, port: &ServicePort, family: fn(&IpAddr) -> bool) -> Vec<Place> {
    let of_family = |ips: &'_ [IpAddr]| ips.iter().copied().filter(family).collect::<BTreeSet<_>>();
    let cluster = of_family(&service.cluster_ips);
    // a frontend several fields name is what the first of them says: kube-proxy looks for them in this order
    let external = &of_family(&service.external_ips) - &cluster;
    let balancer = &(&of_family(&service.load_balancer_ips) - &cluster) - &external;
    let node = port.node_port.zip(cluster.first()).map(|(number, ip)| Place::Node(*ip, number));
    cluster
        .iter()
        .copied()
        .map(Place::Cluster)
        .chain(external.iter().copied().map(Place::External))
        .chain(balancer.iter().copied().map(Place::LoadBalancer))
        .chain(node)
        .collect()
}

impl Place {
    /// The rows of the frontend: one for everybody, or one for those on this node and one for the rest.
    fn add_to(
        self,
        entries: &mut PortEntries,
        service: &Service,
        usable: &EligibleEndpoints,
        node_context: &NodeContext,
    ) {
        let ServicePortKey { port, protocol, .. } = entries.key;
        let key = |ip: IpAddr, port: u16, scope: Scope| ServiceKey {
            addr: ip.into(),
            port: Port::new(port),
            protocol: protocol.number(),
            scope: scope as u8,
        };
        let at = |scope| match self {
            Self::Cluster(ip) | Self::External(ip) | Self::LoadBalancer(ip) => key(ip, port, scope),
            Self::Node(ip, number) => key(ip, number, scope).at_node(),
        };
        let guarded = match self {
            // whatever else it is: kube-proxy guards the address before it asks whose it is. Ranges of the other family alone
            // are no ranges
            Self::Cluster(ip) | Self::External(ip) | Self::LoadBalancer(ip) => {
                service.load_balancer_ips.contains(&ip)
                    && entries.source_ranges.iter().any(|range| range.addr().is_ipv4() == ip.is_ipv4())
            }
            Self::Node(..) => false,
        };
        let guard = if guarded { ServiceFlags::SOURCE_RANGES } else { 0 };
        let policy = match self {
            Self::Cluster(_) => service.internal_policy,
            _ => service.external_policy,
        };
        let local = guard | usable.local_flags();
        // for processes of this node, who never are outside
        let any_local = local | node_context.host_flags(&usable.local);
        let any = guard | node_context.host_flags(&usable.cluster);
        match (self, policy) {
            (_, TrafficPolicy::Cluster) => {
                let direct = if entries.forwarding == Forwarding::Dsr { ServiceFlags::DSR } else { 0 };
                entries.add(Frontend { key: at(Scope::Any), flags: any | direct }, &usable.cluster);
            }
            (Self::Cluster(_), TrafficPolicy::Local) => {
                entries.add(Frontend { key: at(Scope::Any), flags: any_local }, &usable.local);
            }
            // who is on this node asks for the service, not for this node: all endpoints are his (kube-proxy's short
            // circuit). The row for the others is written first
            (_, TrafficPolicy::Local) => {
                entries.add(Frontend { key: at(Scope::Outside), flags: local }, &usable.local);
                let both = any | ServiceFlags::OUTSIDE;
                entries.add(Frontend { key: at(Scope::Any), flags: both }, &usable.cluster);
            }
        }
    }
}

/// The endpoints of a port that get new connections, by the policy of who asks.
#[derive(Debug)]
struct EligibleEndpoints {
    cluster: Vec<Backend>,
    local: Vec<Backend>,
}

impl EligibleEndpoints {
    /// The ready endpoints; if there is none, those that still serve while they terminate (KEP-1669): during a rolling
    /// update of a single replica, the old pod is better than a refusal. Decided for each policy and each family by
    /// itself (`CategorizeEndpoints` of k8s.io/kubernetes/pkg/proxy).
    fn of(
        port: &ServicePort,
        slices: &[&EndpointSlice],
        family: fn(&IpAddr) -> bool,
        node_context: &NodeContext,
        forwarding: Forwarding,
    ) -> Self {
        let all = behind(port, slices, family);
        let nearest = match forwarding {
            Forwarding::Snat => TopologyScope::of(&all, node_context),
            // the node that answers must choose as the one that was asked
            Forwarding::Dsr => TopologyScope::Any,
        };
        let ready = |near: &dyn Fn(&Endpoint) -> bool| {
            let ready = all.iter().filter(|(endpoint, _)| endpoint.ready && near(endpoint));
            ready.map(|(_, backend)| *backend).collect::<BTreeSet<_>>()
        };
        let ending = |near: &dyn Fn(&Endpoint) -> bool| {
            let ending =
                all.iter().filter(|(endpoint, _)| endpoint.serving && endpoint.terminating && near(endpoint));
            ending.map(|(_, backend)| *backend).collect::<BTreeSet<_>>()
        };
        let first = |one: BTreeSet<Backend>, other: BTreeSet<Backend>| -> Vec<Backend> {
            if one.is_empty() { other } else { one }.into_iter().collect()
        };
        let here = |endpoint: &Endpoint| node_context.has(endpoint);
        Self {
            cluster: first(ready(&|endpoint| nearest.takes(endpoint, node_context)), ending(&|_| true)),
            local: first(ready(&here), ending(&here)),
        }
    }

    /// Bits of a frontend that leads to the local endpoints: without one, packets are dropped where others could answer,
    /// and refused where nobody can.
    const fn local_flags(&self) -> u32 {
        if self.local.is_empty() && self.cluster.is_empty() { 0 } else { ServiceFlags::LOCAL }
    }
}

/// Endpoints on this node that are ready, each once: what a health check of the service tells. One of both families has a
/// slice of each, and is one: kube-proxy counts the endpoints of a single family.
pub fn local_ready<'a>(
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node_context: &NodeContext,
) -> usize {
    let endpoints = slices.into_iter().flat_map(|slice| &slice.endpoints);
    let ready = endpoints.filter(|endpoint| endpoint.ready && node_context.has(endpoint));
    let ready: BTreeSet<IpAddr> = ready.map(|endpoint| endpoint.address).collect();
    let ipv4 = ready.iter().filter(|address| address.is_ipv4()).count();
    ipv4.max(ready.len() - ipv4)
}

impl NodeContext {
    /// Bits of a frontend with such backends.
    fn host_flags(&self, backends: &[Backend]) -> u32 {
        let has = backends.iter().any(|backend| self.host.contains(&backend.addr));
        if has { ServiceFlags::HOST_BACKEND } else { 0 }
    }

    /// How a service's backends are chosen and reached.
    fn choices(&self, service: &Service) -> (LoadBalancing, Forwarding) {
        let forwarding = service.forwarding.unwrap_or(match service.load_balancing {
            // what the service says itself goes before what the node would have
            Some(LoadBalancing::Random) => Forwarding::Snat,
            _ => self.forwarding,
        });
        match forwarding {
            Forwarding::Dsr => (LoadBalancing::Maglev, forwarding),
            Forwarding::Snat => (service.load_balancing.unwrap_or(self.load_balancing), forwarding),
        }
    }

    fn has(&self, endpoint: &Endpoint) -> bool {
        endpoint.node_name.as_deref() == Some(self.node.as_str())
    }
}

/// Every endpoint of a port, ready or not, each address once: of two the one that stays is meant, the other is the pod that had
/// it before.
fn behind<'a>(
    port: &ServicePort,
    slices: &[&'a EndpointSlice],
    family: fn(&IpAddr) -> bool,
) -> Vec<(&'a Endpoint, Backend)> {
    let mut found: BTreeMap<Backend, &Endpoint> = BTreeMap::new();
    for slice in slices {
        // a named target port may be another number in every slice
        let targets = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for target in targets {
            for endpoint in slice.endpoints.iter().filter(|endpoint| family(&endpoint.address)) {
                let backend = Backend { addr: endpoint.address.into(), port: Port::new(target.port) };
                if !endpoint.terminating || !found.contains_key(&backend) {
                    found.insert(backend, endpoint);
                }
            }
        }
    }
    found.into_iter().map(|(backend, endpoint)| (endpoint, backend)).collect()
}

/// Which of the ready endpoints of all nodes are near enough (`trafficDistribution`, as hints tell of it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TopologyScope {
    Node,
    Zone,
    /// Not all of them say for whom they are, or none is for this node.
    Any,
}

impl TopologyScope {
    fn of(all: &[(&Endpoint, Backend)], node_context: &NodeContext) -> Self {
        let ready = || all.iter().map(|(endpoint, _)| *endpoint).filter(|endpoint| endpoint.ready);
        let said = |is: fn(&Hints) -> bool| ready().all(|endpoint| endpoint.hints.as_deref().is_some_and(is));
        let some = |near: Self| ready().any(|endpoint| near.takes(endpoint, node_context));
        if said(|hints| !hints.nodes.is_empty()) && some(Self::Node) {
            Self::Node
        } else if said(|hints| !hints.zones.is_empty()) && some(Self::Zone) {
            Self::Zone
        } else {
            Self::Any
        }
    }

    fn takes(self, endpoint: &Endpoint, node_context: &NodeContext) -> bool {
        let hints = endpoint.hints.as_deref();
        match self {
            Self::Node => {
                hints.is_some_and(|hints| hints.nodes.iter().any(|node| *node == node_context.node))
            }
            Self::Zone => hints
                .is_some_and(|hints| hints.zones.iter().any(|zone| Some(zone) == node_context.zone.as_ref())),
            Self::Any => true,
        }
    }
}

/// For each slot an index into `backends`.
fn maglev_table(backends: &[Backend]) -> Vec<u32> {
    if backends.is_empty() {
        return Vec::new();
    }
    let names: Vec<u64> = backends.iter().map(maglev_name).collect();
    let mut table = vec![0; maglev_size(backends.len())];
    maglev::fill(&mut table, &names, &mut vec![0; backends.len()]);
    table
}

fn maglev_size(backends: usize) -> usize {
    let wanted = (backends * MAGLEV_SLOTS_PER_BACKEND).min(MAGLEV_SMOOTH).max(backends);
    let largest = MAGLEV_SIZES[MAGLEV_SIZES.len() - 1];
    MAGLEV_SIZES.into_iter().find(|size| *size >= wanted).unwrap_or(largest)
}

/// A hash of address and port, the same on every node and in every release.
fn maglev_name(backend: &Backend) -> u64 {
    let [a, b, c, d] = backend.addr.words();
    let half = |seed: u32| {
        let words = [a, b, c, d, u32::from(backend.port.wire())];
        words.into_iter().fold(seed, |state, word| hash::finish(state.rotate_left(5) ^ word))
    };
    u64::from(half(0x5bd1_e995)) << 32 | u64::from(half(0x1b87_3593))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{EndpointPort, Owner};

    fn name(name: &str) -> NamespacedName {
        NamespacedName::new("default", name)
    }

    fn service(ips: &[&str], load_balancing: LoadBalancing) -> Service {
        let port = |name: &str, port| ServicePort {
            name: name.into(),
            port,
            protocol: TransportProtocol::Tcp,
            node_port: None,
        };
        Service {
            name: name("web"),
            owner: Owner::default(),
            cluster_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            ports: vec![port("http", 80), port("admin", 90)],
            load_balancing: Some(load_balancing),
            ..Service::default()
        }
    }

    fn slice(port: u16, endpoints: &[(&str, bool, bool)]) -> EndpointSlice {
        EndpointSlice {
            name: name("web-1"),
            owner: Owner::default(),
            service: name("web"),
            ports: vec![EndpointPort { name: "http".into(), port, protocol: TransportProtocol::Tcp }],
            endpoints: endpoints
                .iter()
                .map(|(address, ready, terminating)| Endpoint {
                    address: address.parse().unwrap(),
                    ready: *ready,
                    serving: *ready || *terminating,
                    terminating: *terminating,
                    node_name: None,
                    hints: None,
                })
                .collect(),
            trigger_time: None,
        }
    }

    fn compiled(service: &Service, slices: &[EndpointSlice]) -> ServiceEntries {
        compile(
            service,
            slices,
            &NodeContext { node: "here".to_owned(), zone: Some("west".into()), ..NodeContext::default() },
        )
    }

    fn listed(entries: &ServiceEntries) -> Vec<String> {
        let backends = entries.ports[0].groups.iter().flat_map(|group| &group.backends);
        backends.map(|b| format!("{} {}", b.addr, b.port)).collect()
    }

    #[test]
    fn each_slice_has_its_own_target_port() {
        let service = service(&["10.96.0.1"], LoadBalancing::Random);
        let slices = [slice(8080, &[("10.1.0.2", true, false)]), slice(8081, &[("10.1.1.2", true, false)])];
        let entries = compiled(&service, &slices);
        assert_eq!(listed(&entries), ["10.1.0.2 8080", "10.1.1.2 8081"]);
        assert!(entries.ports[1].groups[0].backends.is_empty(), "no slice has a port of that name");
    }

    #[test]
    fn the_cut_of_slices_does_not_show() {
        let service = service(&["10.96.0.1"], LoadBalancing::Random);
        let one = [slice(80, &[("10.1.0.2", true, false), ("10.1.0.3", true, false)])];
        let two = [
            slice(80, &[("10.1.0.3", true, false)]),
            slice(80, &[("10.1.0.2", true, false), ("10.1.0.3", true, false)]),
        ];
        assert_eq!(compiled(&service, &one), compiled(&service, &two));
    }

    #[test]
    fn terminating_endpoints_serve_only_when_nothing_is_ready() {
        let service = service(&["10.96.0.1"], LoadBalancing::Random);
        let rolling = [slice(80, &[("10.1.0.2", false, true), ("10.1.0.3", false, false)])];
        assert_eq!(listed(&compiled(&service, &rolling)), ["10.1.0.2 80"]);
        let ready = [slice(80, &[("10.1.0.2", false, true), ("10.1.0.3", true, false)])];
        assert_eq!(listed(&compiled(&service, &ready)), ["10.1.0.3 80"]);
    }

    /// An address is used again before the pod that had it is gone from the API (Kubernetes 1.36).
    #[test]
    fn of_two_with_one_address_the_one_that_stays_is_meant() {
        let service = service(&["10.96.0.1"], LoadBalancing::Random);
        let ends = slice(80, &[("10.1.0.2", false, true)]);
        for stays in [true, false] {
            let other = slice(80, &[("10.1.0.2", stays, false)]);
            for slices in [[ends.clone(), other.clone()], [other.clone(), ends.clone()]] {
                let expected: &[&str] = if stays { &["10.1.0.2 80"] } else { &[] };
                assert_eq!(listed(&compiled(&service, &slices)), expected);
            }
        }
    }

    #[test]
    fn a_frontend_has_the_backends_of_its_family() {
        let service = service(&["10.96.0.1", "fd00::1"], LoadBalancing::Random);
        let slices = [slice(80, &[("10.1.0.2", true, false), ("fd01::2", true, false)])];
        assert_eq!(
            shown(&compiled(&service, &slices)),
            ["10.96.0.1:80 -> 10.1.0.2", "fd00::1:80 -> fd01::2"]
        );
    }

    /// Each frontend of the first port with its flags and backends.
    fn shown(entries: &ServiceEntries) -> Vec<String> {
        let flags = [
            (ServiceFlags::OUTSIDE, " others-apart"),
            (ServiceFlags::LOCAL, " local"),
            (ServiceFlags::SOURCE_RANGES, " guarded"),
            (ServiceFlags::DSR, " direct"),
            (ServiceFlags::HOST_BACKEND, " at-host"),
        ];
        let mut all = Vec::new();
        for group in &entries.ports[0].groups {
            for Frontend { key, flags: bits } in &group.frontends {
                let scope = if key.scope == Scope::Any as u8 { "" } else { " outside" };
                let flags: String =
                    flags.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
                let backends: Vec<_> = group.backends.iter().map(|b| b.addr.to_string()).collect();
                all.push(format!("{}:{}{scope}{flags} -> {}", key.addr, key.port, backends.join(" ")));
            }
        }
        all.sort();
        all
    }

    /// A service on every frontend there is, with a backend here and one elsewhere.
    fn everywhere(
        internal_policy: TrafficPolicy,
        external_policy: TrafficPolicy,
    ) -> (Service, EndpointSlice) {
        let mut service = Service {
            external_ips: vec!["192.0.2.1".parse().unwrap(), "10.96.0.1".parse().unwrap()],
            load_balancer_ips: vec!["192.0.2.2".parse().unwrap()],
            internal_policy,
            external_policy,
            ..service(&["10.96.0.1"], LoadBalancing::Random)
        };
        service.ports[0].node_port = Some(30_080);
        let mut slice = slice(80, &[("10.1.0.2", true, false), ("10.1.1.2", true, false)]);
        slice.endpoints[0].node_name = Some("here".into());
        slice.endpoints[1].node_name = Some("there".into());
        (service, slice)
    }

    #[test]
    fn every_frontend_leads_to_the_endpoints_of_its_policy() {
        use TrafficPolicy::{Cluster, Local};
        let (service, slice) = everywhere(Cluster, Cluster);
        assert_eq!(
            shown(&compiled(&service, std::slice::from_ref(&slice))),
            [
                "0.0.0.0:30080 -> 10.1.0.2 10.1.1.2",
                "10.96.0.1:80 -> 10.1.0.2 10.1.1.2",
                "192.0.2.1:80 -> 10.1.0.2 10.1.1.2",
                "192.0.2.2:80 -> 10.1.0.2 10.1.1.2",
            ]
        );
        let (service, slice) = everywhere(Local, Local);
        assert_eq!(
            shown(&compiled(&service, &[slice])),
            [
                "0.0.0.0:30080 others-apart -> 10.1.0.2 10.1.1.2",
                "0.0.0.0:30080 outside local -> 10.1.0.2",
                "10.96.0.1:80 local -> 10.1.0.2",
                "192.0.2.1:80 others-apart -> 10.1.0.2 10.1.1.2",
                "192.0.2.1:80 outside local -> 10.1.0.2",
                "192.0.2.2:80 others-apart -> 10.1.0.2 10.1.1.2",
                "192.0.2.2:80 outside local -> 10.1.0.2",
            ]
        );
    }

    #[test]
    fn a_local_policy_without_endpoints_anywhere_refuses_instead_of_dropping() {
        let (service, mut slice) = everywhere(TrafficPolicy::Local, TrafficPolicy::Cluster);
        slice.endpoints[0].node_name = None;
        let dropped = shown(&compiled(&service, std::slice::from_ref(&slice)));
        assert!(dropped.contains(&"10.96.0.1:80 local -> ".to_owned()), "{dropped:?}");
        for endpoint in &mut slice.endpoints {
            (endpoint.ready, endpoint.serving) = (false, false);
        }
        let refused = shown(&compiled(&service, &[slice]));
        assert!(refused.contains(&"10.96.0.1:80 -> ".to_owned()), "{refused:?}");
    }

    #[test]
    fn frontends_that_lead_to_the_node_itself_say_so() {
        let (service, mut slice) = everywhere(TrafficPolicy::Local, TrafficPolicy::Local);
        slice.endpoints[0].address = "192.168.1.1".parse().unwrap();
        let mut node_context = NodeContext { node: "here".to_owned(), ..NodeContext::default() };
        let elsewhere = compile(&service, [&slice], &node_context);
        assert!(shown(&elsewhere).iter().all(|line| !line.contains("at-host")));
        node_context.host.insert("192.168.1.1".parse::<IpAddr>().unwrap().into());
        let marked: Vec<_> = shown(&compile(&service, [&slice], &node_context))
            .into_iter()
            .filter(|line| line.contains("at-host"))
            .map(|line| line.split(' ').next().unwrap_or_default().to_owned())
            .collect();
        // not the rows of those outside, who never are processes of the node
        assert_eq!(marked, ["0.0.0.0:30080", "10.96.0.1:80", "192.0.2.1:80", "192.0.2.2:80"]);
    }

    #[test]
    fn local_endpoints_that_terminate_serve_where_no_local_one_is_ready() {
        let (service, mut slice) = everywhere(TrafficPolicy::Local, TrafficPolicy::Cluster);
        (slice.endpoints[0].ready, slice.endpoints[0].terminating) = (false, true);
        let both = shown(&compiled(&service, &[slice]));
        assert_eq!(both[0], "0.0.0.0:30080 -> 10.1.1.2");
        assert_eq!(both[1], "10.96.0.1:80 local -> 10.1.0.2");
    }

    /// Two nodes that choose the same backend must choose among the same ones.
    #[test]
    fn a_direct_return_is_of_frontends_that_lead_everywhere_and_knows_no_hints() {
        let (mut service, mut slice) = everywhere(TrafficPolicy::Local, TrafficPolicy::Cluster);
        service.forwarding = Some(Forwarding::Dsr);
        let near = Hints { nodes: Box::new([]), zones: Box::new(["west".into()]) };
        slice.endpoints[0].hints = Some(Box::new(near));
        let far = Hints { nodes: Box::new([]), zones: Box::new(["east".into()]) };
        slice.endpoints[1].hints = Some(Box::new(far));
        let entries = compiled(&service, &[slice]);
        assert_eq!(entries.ports[0].flags(), ServiceFlags::HASH);
        let both = shown(&entries);
        assert_eq!(both[0], "0.0.0.0:30080 direct -> 10.1.0.2 10.1.1.2");
        assert_eq!(both[1], "10.96.0.1:80 local -> 10.1.0.2");
    }

    #[test]
    fn what_a_service_does_not_choose_is_the_nodes() {
        use Forwarding::{Dsr, Snat};
        use LoadBalancing::{Maglev, Random};
        let chosen = |node: (LoadBalancing, Forwarding), load_balancing, forwarding| {
            let node_context =
                NodeContext { load_balancing: node.0, forwarding: node.1, ..NodeContext::default() };
            node_context.choices(&Service { load_balancing, forwarding, ..Service::default() })
        };
        assert_eq!(chosen((Random, Snat), None, None), (Random, Snat));
        assert_eq!(chosen((Random, Snat), None, Some(Dsr)), (Maglev, Dsr));
        assert_eq!(chosen((Maglev, Snat), None, None), (Maglev, Snat));
        assert_eq!(chosen((Maglev, Snat), Some(Random), None), (Random, Snat));
        assert_eq!(chosen((Random, Dsr), None, None), (Maglev, Dsr));
        assert_eq!(chosen((Random, Dsr), Some(Random), None), (Random, Snat));
        assert_eq!(chosen((Random, Dsr), None, Some(Snat)), (Random, Snat));
    }

    #[test]
    fn hints_count_if_all_endpoints_have_them_and_one_is_meant_for_here() {
        let hints = |nodes: &[&str], zones: &[&str]| {
            let names = |texts: &[&str]| texts.iter().map(|text| Name::from(*text)).collect();
            Some(Box::new(Hints { nodes: names(nodes), zones: names(zones) }))
        };
        let (service, mut slice) = everywhere(TrafficPolicy::Cluster, TrafficPolicy::Cluster);
        let cases = [
            (hints(&["here"], &["west"]), hints(&["there"], &["west"]), "10.1.0.2"),
            (hints(&["other"], &["east"]), hints(&["there"], &["west"]), "10.1.1.2"),
            (hints(&[], &["west"]), hints(&["here"], &["west"]), "10.1.0.2 10.1.1.2"),
            (hints(&["here"], &["west"]), None, "10.1.0.2 10.1.1.2"),
            (hints(&["other"], &["east"]), hints(&["there"], &["south"]), "10.1.0.2 10.1.1.2"),
        ];
        for (here, there, expected) in cases {
            slice.endpoints[0].hints = here;
            slice.endpoints[1].hints = there;
            let shown = shown(&compiled(&service, std::slice::from_ref(&slice)));
            assert_eq!(shown[1], format!("10.96.0.1:80 -> {expected}"), "{slice:?}");
        }
        // who is not ready is not asked what it says
        slice.endpoints[0].hints = hints(&[], &["west"]);
        slice.endpoints[1].hints = None;
        slice.endpoints[1].ready = false;
        assert_eq!(shown(&compiled(&service, &[slice]))[1], "10.96.0.1:80 -> 10.1.0.2");
    }

    #[test]
    fn a_health_check_counts_a_ready_endpoint_of_this_node_once() {
        let node_context = NodeContext { node: "here".to_owned(), ..NodeContext::default() };
        let mut ipv4 = slice(80, &[("10.1.0.2", true, false), ("10.1.0.3", false, true)]);
        let mut ipv6 = slice(80, &[("fd01::2", true, false), ("fd01::9", true, false)]);
        ipv4.endpoints.iter_mut().for_each(|endpoint| endpoint.node_name = Some("here".into()));
        ipv6.endpoints[0].node_name = Some("here".into());
        // of both families, twice in IPv4; the other ones terminate, or are elsewhere
        assert_eq!(local_ready([&ipv4, &ipv4, &ipv6], &node_context), 1);
        ipv4.endpoints[1].ready = true;
        assert_eq!(local_ready([&ipv4, &ipv6], &node_context), 2);
        assert_eq!(
            local_ready([&ipv6], &NodeContext { node: "there".to_owned(), ..NodeContext::default() }),
            0
        );
    }

    #[test]
    fn source_ranges_guard_the_addresses_of_the_load_balancer() {
        let (mut service, slice) = everywhere(TrafficPolicy::Cluster, TrafficPolicy::Cluster);
        service.source_ranges = vec!["198.51.100.0/24".parse().unwrap()];
        let entries = compiled(&service, std::slice::from_ref(&slice));
        let guarded: Vec<_> = shown(&entries).into_iter().filter(|line| line.contains("guarded")).collect();
        assert_eq!(guarded, ["192.0.2.2:80 guarded -> 10.1.0.2 10.1.1.2"]);
        service.source_ranges = vec!["2001:db8::/32".parse().unwrap()];
        let other_family = shown(&compiled(&service, &[slice]));
        assert!(other_family.iter().all(|line| !line.contains("guarded")), "{other_family:?}");
    }

    #[test]
    fn a_maglev_table_gives_even_shares_and_survives_a_removal() {
        let service = service(&["10.96.0.1"], LoadBalancing::Maglev);
        let all: Vec<String> = (1..=9).map(|n| format!("10.1.0.{n}")).collect();
        let endpoints: Vec<_> = all.iter().map(|ip| (ip.as_str(), true, false)).collect();
        let before = compiled(&service, &[slice(80, &endpoints)]);
        let after = compiled(&service, &[slice(80, &endpoints[1..])]);
        let chosen = |entries: &ServiceEntries| -> Vec<Backend> {
            let port = &entries.ports[0];
            let backends = &port.groups[0].backends;
            maglev_table(backends).iter().map(|index| backends[*index as usize]).collect()
        };
        let (before, after) = (chosen(&before), chosen(&after));
        assert_eq!((before.len(), after.len()), (1_021, 1_021));
        let gone = before.iter().copied().min().unwrap();
        let moved = before.iter().zip(&after).filter(|(old, new)| **old != gone && old != new).count();
        assert!(moved < 1_021 / 10, "{moved} slots of living backends moved");
    }

    #[test]
    fn maglev_tables_have_room_for_every_backend() {
        for backends in [1, 2, 3, 100, 163, 164, 20_000, 100_000] {
            assert!(maglev_size(backends) >= backends);
        }
    }
}
