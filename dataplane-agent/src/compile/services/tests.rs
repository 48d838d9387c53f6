//! Compiling a Service: backends, families, slices and Maglev tables.

mod policies;

use super::{
    maglev::{maglev_length, maglev_table},
    *,
};
use crate::state::{Endpoint, EndpointPort, Owner, TrafficPolicy};
use dataplane_common::abi::Scope;

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

/// Lists each frontend of the first port with its flags and backends.
fn shown(entries: &ServiceEntries) -> Vec<String> {
    let flags = [
        (ServiceFlags::OUTSIDE, " split"),
        (ServiceFlags::LOCAL, " local"),
        (ServiceFlags::SOURCE_RANGES, " source-ranges"),
        (ServiceFlags::DSR, " dsr"),
        (ServiceFlags::HOST_BACKEND, " host-backend"),
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

/// A Service with all frontend kinds, one local backend and one remote backend.
fn service_with_all_frontends(
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
fn target_port_may_differ_between_slices() {
    let service = service(&["10.96.0.1"], LoadBalancing::Random);
    let slices = [slice(8080, &[("10.1.0.2", true, false)]), slice(8081, &[("10.1.1.2", true, false)])];
    let entries = compiled(&service, &slices);
    assert_eq!(listed(&entries), ["10.1.0.2 8080", "10.1.1.2 8081"]);
    assert!(entries.ports[1].groups[0].backends.is_empty(), "no slice has a port of that name");
}

#[test]
fn result_is_independent_of_slice_boundaries() {
    let service = service(&["10.96.0.1"], LoadBalancing::Random);
    let one = [slice(80, &[("10.1.0.2", true, false), ("10.1.0.3", true, false)])];
    let two = [
        slice(80, &[("10.1.0.3", true, false)]),
        slice(80, &[("10.1.0.2", true, false), ("10.1.0.3", true, false)]),
    ];
    assert_eq!(compiled(&service, &one), compiled(&service, &two));
}

#[test]
fn terminating_endpoints_are_used_only_if_none_is_ready() {
    let service = service(&["10.96.0.1"], LoadBalancing::Random);
    let rolling = [slice(80, &[("10.1.0.2", false, true), ("10.1.0.3", false, false)])];
    assert_eq!(listed(&compiled(&service, &rolling)), ["10.1.0.2 80"]);
    let ready = [slice(80, &[("10.1.0.2", false, true), ("10.1.0.3", true, false)])];
    assert_eq!(listed(&compiled(&service, &ready)), ["10.1.0.3 80"]);
}

/// An address may be reused before the former pod is deleted (Kubernetes 1.36).
#[test]
fn non_terminating_endpoint_wins_shared_address() {
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
fn frontend_has_backends_of_its_family() {
    let service = service(&["10.96.0.1", "fd00::1"], LoadBalancing::Random);
    let slices = [slice(80, &[("10.1.0.2", true, false), ("fd01::2", true, false)])];
    assert_eq!(shown(&compiled(&service, &slices)), ["10.96.0.1:80 -> 10.1.0.2", "fd00::1:80 -> fd01::2"]);
}

#[test]
fn maglev_table_moves_few_slots_when_backend_is_removed() {
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
    let removed = before.iter().copied().min().unwrap();
    let moved = before.iter().zip(&after).filter(|(old, new)| **old != removed && old != new).count();
    assert!(moved < 1_021 / 10, "{moved} slots of remaining backends moved");
}

#[test]
fn maglev_table_has_slot_for_every_backend() {
    for backends in [1, 2, 3, 100, 163, 164, 20_000, 100_000] {
        assert!(maglev_length(backends) >= backends);
    }
}
