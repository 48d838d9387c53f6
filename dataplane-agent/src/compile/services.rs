//! A service and its endpoint slices → frontends, and the backends behind them.
//!
//! The result is sorted and free of duplicates, so that equal meaning is equal value: the reconciler writes nothing
//! when a slice is cut differently but says the same.

use std::{collections::BTreeSet, net::IpAddr};

use dataplane_common::{
    abi::{Addr, Port, Scope, ServiceFlags, ServiceKey},
    hash, maglev,
};

use crate::state::{
    Endpoint, EndpointSlice, LoadBalancing, Name, NamespacedName, Service, ServicePort, TransportProtocol,
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
    /// The frontends are at the host's own addresses.
    pub on_host: bool,
    /// Where the port is, sorted.
    pub frontends: Vec<ServiceKey>,
    /// Sorted.
    pub ipv4: Vec<Backend>,
    /// Sorted.
    pub ipv6: Vec<Backend>,
}

impl PortEntries {
    /// The backends a frontend leads to: those of its family.
    pub fn backends(&self, frontend: &ServiceKey) -> &[Backend] {
        if frontend.addr.is_v4() { &self.ipv4 } else { &self.ipv6 }
    }

    /// Bits of [`ServiceFlags`].
    pub const fn flags(&self) -> u32 {
        let hash = match self.load_balancing {
            LoadBalancing::Random => 0,
            LoadBalancing::Maglev => ServiceFlags::HASH,
        };
        if self.on_host { hash | ServiceFlags::HOST_PORT } else { hash }
    }

    /// The range a frontend needs in `BACKENDS`: for each slot an index into `backends`.
    pub fn layout(&self, backends: &[Backend]) -> Vec<u32> {
        match self.load_balancing {
            LoadBalancing::Random => (0..backends.len() as u32).collect(),
            LoadBalancing::Maglev => maglev_layout(backends),
        }
    }
}

/// The entries of a service.
pub fn compile<'a>(service: &Service, slices: impl IntoIterator<Item = &'a EndpointSlice>) -> ServiceEntries {
    let slices: Vec<_> = slices.into_iter().collect();
    let mut ports: Vec<_> = service.ports.iter().map(|port| port_entries(service, port, &slices)).collect();
    ports.sort_by(|a, b| a.key.cmp(&b.key));
    ports.dedup_by(|a, b| a.key == b.key);
    ServiceEntries { ports }
}

fn port_entries(service: &Service, port: &ServicePort, slices: &[&EndpointSlice]) -> PortEntries {
    let frontends: BTreeSet<_> = service.cluster_ips.iter().map(|ip| frontend(*ip, port)).collect();
    PortEntries {
        key: ServicePortKey { service: service.name.clone(), port: port.port, protocol: port.protocol },
        name: port.name.clone(),
        affinity_timeout: service.affinity_timeout.unwrap_or(0),
        load_balancing: service.load_balancing,
        on_host: false,
        frontends: frontends.into_iter().collect(),
        ipv4: backends(port, slices, IpAddr::is_ipv4),
        ipv6: backends(port, slices, IpAddr::is_ipv6),
    }
}

fn frontend(ip: IpAddr, port: &ServicePort) -> ServiceKey {
    ServiceKey {
        addr: ip.into(),
        port: Port::new(port.port),
        protocol: port.protocol.number(),
        scope: Scope::Any as u8,
    }
}

/// The ready endpoints; if there is none, those that still serve while they terminate (KEP-1669): during a rolling
/// update of a single replica, the old pod is better than a refusal. Decided per family: a frontend can use only its own.
fn backends(port: &ServicePort, slices: &[&EndpointSlice], family: fn(&IpAddr) -> bool) -> Vec<Backend> {
    let ready = collect(port, slices, family, |endpoint| endpoint.ready);
    if !ready.is_empty() {
        return ready;
    }
    collect(port, slices, family, |endpoint| endpoint.serving && endpoint.terminating)
}

fn collect(
    port: &ServicePort,
    slices: &[&EndpointSlice],
    family: fn(&IpAddr) -> bool,
    usable: fn(&Endpoint) -> bool,
) -> Vec<Backend> {
    let mut found = BTreeSet::new();
    for slice in slices {
        // a named target port may be another number in every slice
        let targets = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for target in targets {
            for endpoint in slice.endpoints.iter().filter(|endpoint| usable(endpoint)) {
                if family(&endpoint.address) {
                    found.insert(Backend { addr: endpoint.address.into(), port: Port::new(target.port) });
                }
            }
        }
    }
    found.into_iter().collect()
}

fn maglev_layout(backends: &[Backend]) -> Vec<u32> {
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
        let port =
            |name: &str, port| ServicePort { name: name.into(), port, protocol: TransportProtocol::Tcp };
        Service {
            name: name("web"),
            owner: Owner::default(),
            cluster_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            ports: vec![port("http", 80), port("admin", 90)],
            affinity_timeout: None,
            load_balancing,
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
                })
                .collect(),
            trigger_time: None,
        }
    }

    fn listed(entries: &ServiceEntries) -> Vec<String> {
        let port = &entries.ports[0];
        port.ipv4.iter().chain(&port.ipv6).map(|b| format!("{} {}", b.addr, b.port)).collect()
    }

    #[test]
    fn each_slice_has_its_own_target_port() {
        let service = service(&["10.96.0.1"], LoadBalancing::Random);
        let slices = [slice(8080, &[("10.1.0.2", true, false)]), slice(8081, &[("10.1.1.2", true, false)])];
        let entries = compile(&service, slices.iter());
        assert_eq!(listed(&entries), ["10.1.0.2 8080", "10.1.1.2 8081"]);
        assert!(entries.ports[1].ipv4.is_empty(), "no slice has a port of that name");
    }

    #[test]
    fn the_cut_of_slices_does_not_show() {
        let service = service(&["10.96.0.1"], LoadBalancing::Random);
        let one = [slice(80, &[("10.1.0.2", true, false), ("10.1.0.3", true, false)])];
        let two = [
            slice(80, &[("10.1.0.3", true, false)]),
            slice(80, &[("10.1.0.2", true, false), ("10.1.0.3", true, false)]),
        ];
        assert_eq!(compile(&service, one.iter()), compile(&service, two.iter()));
    }

    #[test]
    fn terminating_endpoints_serve_only_when_nothing_is_ready() {
        let service = service(&["10.96.0.1"], LoadBalancing::Random);
        let rolling = [slice(80, &[("10.1.0.2", false, true), ("10.1.0.3", false, false)])];
        assert_eq!(listed(&compile(&service, rolling.iter())), ["10.1.0.2 80"]);
        let ready = [slice(80, &[("10.1.0.2", false, true), ("10.1.0.3", true, false)])];
        assert_eq!(listed(&compile(&service, ready.iter())), ["10.1.0.3 80"]);
    }

    #[test]
    fn a_frontend_has_the_backends_of_its_family() {
        let service = service(&["10.96.0.1", "fd00::1"], LoadBalancing::Random);
        let slices = [slice(80, &[("10.1.0.2", true, false), ("fd01::2", true, false)])];
        let entries = compile(&service, slices.iter());
        let port = &entries.ports[0];
        let behind: Vec<_> = port.frontends.iter().map(|f| port.backends(f)[0].addr.to_string()).collect();
        let expected =
            if port.frontends[0].addr.is_v4() { ["10.1.0.2", "fd01::2"] } else { ["fd01::2", "10.1.0.2"] };
        assert_eq!(behind, expected);
    }

    #[test]
    fn a_maglev_table_gives_even_shares_and_survives_a_removal() {
        let service = service(&["10.96.0.1"], LoadBalancing::Maglev);
        let all: Vec<String> = (1..=9).map(|n| format!("10.1.0.{n}")).collect();
        let endpoints: Vec<_> = all.iter().map(|ip| (ip.as_str(), true, false)).collect();
        let before = compile(&service, [slice(80, &endpoints)].iter());
        let after = compile(&service, [slice(80, &endpoints[1..])].iter());
        let chosen = |entries: &ServiceEntries| -> Vec<Backend> {
            let port = &entries.ports[0];
            port.layout(&port.ipv4).iter().map(|index| port.ipv4[*index as usize]).collect()
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
