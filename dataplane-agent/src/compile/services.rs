//! A Service and its EndpointSlices → frontends and their backends.
//!
//! The result is sorted and free of duplicates, so that equal meaning is an equal value: the
//! reconciler writes nothing when endpoints only move between slices.

mod eligible;
mod frontends;
mod maglev;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_common::abi::{Addr, Port, ServiceFlags, ServiceKey};
use ipnet::IpNet;

pub use self::eligible::count_local_ready;
use self::{
    eligible::{EligibleEndpoints, endpoints_of_port},
    frontends::frontends,
    maglev::maglev_table,
};
use crate::state::{
    Endpoint, EndpointSlice, Forwarding, LoadBalancing, Name, NamespacedName, Service, ServicePort,
    TransportProtocol,
};

/// Key of a Service port; each has a service ID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortKey {
    pub service: NamespacedName,
    pub port: u16,
    pub protocol: TransportProtocol,
}

/// The destination of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    pub addr: Addr,
    pub port: Port,
}

/// The desired entries of a Service on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceEntries {
    pub ports: Vec<PortEntries>,
}

/// The desired entries of one Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortEntries {
    pub key: ServicePortKey,
    /// Name of the port in the Service.
    pub name: Name,
    /// Seconds; 0 without session affinity.
    pub affinity_timeout: u32,
    pub load_balancing: LoadBalancing,
    pub forwarding: Forwarding,
    /// Clients allowed at frontends with [`ServiceFlags::SOURCE_RANGES`], sorted.
    pub source_ranges: Vec<IpNet>,
    /// Frontends by backends: each frontend once, each backend list once per family.
    pub groups: Vec<Group>,
    /// For UDP: all serving endpoints, sorted, whether or not they get new connections. Existing
    /// flows to them continue when policies, hints or readiness exclude them, as TCP connections do
    /// (kube-proxy's `CleanStaleEntries`).
    pub serving_udp: Vec<Backend>,
}

/// Frontends of one family with the same backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Sorted.
    pub frontends: Vec<Frontend>,
    /// Sorted.
    pub backends: Vec<Backend>,
}

/// An address and port at which a Service is reachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Frontend {
    pub key: ServiceKey,
    /// Bits of [`ServiceFlags`] without [`ServiceFlags::HASH`], which belongs to the port.
    pub flags: u32,
}

/// The properties of this node that the entries depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeContext {
    pub node: String,
    /// The node's label `topology.kubernetes.io/zone`.
    pub zone: Option<Name>,
    /// All addresses of the node.
    pub host: BTreeSet<Addr>,
    /// Default for Services without the annotation.
    pub load_balancing: LoadBalancing,
    /// Default for Services without the annotation.
    pub forwarding: Forwarding,
}

impl PortEntries {
    /// Whether this is a port, not the addresses of the Service.
    pub const fn is_port(&self) -> bool {
        self.key.port != 0
    }

    /// All frontends.
    pub fn frontends(&self) -> impl Iterator<Item = &ServiceKey> {
        self.groups.iter().flat_map(|group| &group.frontends).map(|frontend| &frontend.key)
    }

    /// Bits of [`ServiceFlags`] shared by all frontends.
    pub const fn flags(&self) -> u32 {
        match self.load_balancing {
            LoadBalancing::Random => 0,
            LoadBalancing::Maglev => ServiceFlags::HASH,
        }
    }

    /// The content of a group's range in `BACKENDS`: the backend ID in each slot, given the ID of
    /// each backend.
    pub fn slot_layout(&self, backends: &[Backend], numbers: &[u32]) -> Vec<u32> {
        match self.load_balancing {
            // sorted, so that the datapath finds the backend of session affinity
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

    /// Adds a frontend with these backends.
    pub fn add(&mut self, frontend: Frontend, backends: &[Backend]) {
        let is_v4 = frontend.key.addr.is_v4();
        let same =
            |group: &&mut Group| group.frontends[0].key.addr.is_v4() == is_v4 && group.backends == backends;
        let group = match self.groups.iter_mut().find(same) {
            Some(group) => group,
            None => self.groups.push_mut(Group { frontends: Vec::new(), backends: backends.to_vec() }),
        };
        if let Err(position) = group.frontends.binary_search_by_key(&frontend.key, |known| known.key) {
            group.frontends.insert(position, frontend);
        }
    }
}

/// Compiles a Service for this node.
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
    let addresses = address_entries(service, &ports);
    ports.push(addresses);
    // a cluster has many Services: drop the spare capacity of lists grown by push
    for port in &mut ports {
        port.groups.iter_mut().for_each(|group| group.frontends.shrink_to_fit());
        port.groups.shrink_to_fit();
    }
    ports.shrink_to_fit();
    ServiceEntries { ports }
}

/// Entries of the addresses of a Service: a port with number 0. A cluster IP is marked as such for
/// every port; other addresses have a row while pings to them are answered.
fn address_entries(service: &Service, ports: &[PortEntries]) -> PortEntries {
    let groups = ports.iter().flat_map(|port| &port.groups).filter(|group| !group.backends.is_empty());
    let ready: BTreeSet<Addr> =
        groups.flat_map(|group| &group.frontends).map(|frontend| frontend.key.addr).collect();
    let mut entries = PortEntries {
        key: ServicePortKey { service: service.name.clone(), port: 0, protocol: TransportProtocol::Tcp },
        name: Name::default(),
        affinity_timeout: 0,
        load_balancing: LoadBalancing::Random,
        forwarding: Forwarding::Snat,
        source_ranges: Vec::new(),
        groups: Vec::new(),
        serving_udp: Vec::new(),
    };
    for ip in &service.cluster_ips {
        let addr = Addr::from(*ip);
        let flags = if ready.contains(&addr) { ServiceFlags::READY } else { 0 };
        entries.add(Frontend { key: ServiceKey::of_address(addr), flags }, &[]);
    }
    for ip in service.external_ips.iter().chain(&service.load_balancer_ips) {
        let addr = Addr::from(*ip);
        if ready.contains(&addr) && !service.cluster_ips.contains(ip) {
            entries.add(Frontend { key: ServiceKey::of_ping(addr), flags: ServiceFlags::READY }, &[]);
        }
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
    let (load_balancing, forwarding) = node_context.options_of(service);
    let mut entries = PortEntries {
        key: ServicePortKey { service: service.name.clone(), port: port.port, protocol: port.protocol },
        name: port.name.clone(),
        affinity_timeout: service.affinity_timeout.unwrap_or(0),
        load_balancing,
        forwarding,
        source_ranges,
        groups: Vec::new(),
        serving_udp: serving_udp(port, slices),
    };
    for family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
        let eligible = EligibleEndpoints::of(port, slices, family, node_context, forwarding);
        for frontend in frontends(service, port, family) {
            frontend.add_to(&mut entries, service, &eligible, node_context);
        }
    }
    entries
}

/// Serving endpoints of a UDP port, of both families.
fn serving_udp(port: &ServicePort, slices: &[&EndpointSlice]) -> Vec<Backend> {
    if port.protocol != TransportProtocol::Udp {
        return Vec::new();
    }
    let all = endpoints_of_port(port, slices, |_| true);
    let serving = all.into_iter().filter(|(endpoint, _)| endpoint.serving).map(|(_, backend)| backend);
    serving.collect::<BTreeSet<_>>().into_iter().collect()
}

impl NodeContext {
    /// Flags of a frontend with these backends.
    fn host_flags(&self, backends: &[Backend]) -> u32 {
        let on_host = backends.iter().any(|backend| self.host.contains(&backend.addr));
        if on_host { ServiceFlags::HOST_BACKEND } else { 0 }
    }

    /// Load balancing and forwarding of a Service: its annotations, then the node's defaults.
    fn options_of(&self, service: &Service) -> (LoadBalancing, Forwarding) {
        let forwarding = service.forwarding.unwrap_or(match service.load_balancing {
            // the Service's annotation takes precedence over the node's default
            Some(LoadBalancing::Random) => Forwarding::Snat,
            _ => self.forwarding,
        });
        match forwarding {
            Forwarding::Dsr => (LoadBalancing::Maglev, forwarding),
            Forwarding::Snat => (service.load_balancing.unwrap_or(self.load_balancing), forwarding),
        }
    }

    fn is_local(&self, endpoint: &Endpoint) -> bool {
        endpoint.node_name.as_deref() == Some(self.node.as_str())
    }
}
