//! Frontends, ranges and backends.

use super::*;
use crate::{
    reconcile::{SocketUpdate, sockets::UdpBackend},
    state::Hints,
};

const TCP: TransportProtocol = TransportProtocol::Tcp;
const UDP: TransportProtocol = TransportProtocol::Udp;

pub(super) fn addresses(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|n| format!("10.1.{}.{}", n / 250, n % 250 + 1))
}

/// A fixture with Service `web` at 10.96.0.1 and this many backends.
pub(super) fn web(capacities: Capacities, backends: usize) -> Fixture {
    let mut fixture = Fixture::new(capacities);
    fixture.apply([
        upsert(service("web", &["10.96.0.1"])),
        upsert(slice("web", addresses(backends))),
        SourceEvent::Synced,
    ]);
    fixture.settle();
    fixture
}

pub(super) fn generation(fixture: &Fixture, backend: &BackendSlot) -> u32 {
    fixture.generations.get(&backend.id).unwrap().unwrap()
}

pub(super) fn slot(fixture: &Fixture, frontend: &ServiceKey, index: u32) -> BackendSlot {
    let row = fixture.services.get(frontend).unwrap().unwrap();
    fixture.backends.get(&(row.first_slot + index)).unwrap().unwrap()
}

#[test]
fn service_has_backends_on_every_port() {
    let fixture = web(LARGE, 2);
    for protocol in [TCP, UDP] {
        let backends_of = fixture.backends_of(&frontend("10.96.0.1", protocol)).unwrap();
        assert_eq!(backends_of, ["10.1.0.1:5300", "10.1.0.2:5300"]);
    }
    let ids: Vec<_> = fixture.services.entries().unwrap().into_iter().map(|(_, row)| row.id).collect();
    assert!(ids[0] != ids[1] && !ids.contains(&0), "each port has its own ID: {ids:?}");
    assert_ne!(
        slot(&fixture, &frontend("10.96.0.1", TCP), 0).id,
        slot(&fixture, &frontend("10.96.0.1", UDP), 0).id,
        "a backend is an address, a port and a protocol"
    );
}

#[test]
fn service_without_backends_has_empty_row() {
    let fixture = web(LARGE, 0);
    let row = fixture.services.get(&frontend("10.96.0.1", TCP)).unwrap().unwrap();
    assert_eq!((row.count, row.first_slot), (0, 0));
}

#[test]
fn removed_backend_makes_only_its_flows_stale() {
    let mut fixture = web(LARGE, 2);
    let frontend = frontend("10.96.0.1", UDP);
    let (removed, stays) = (slot(&fixture, &frontend, 0), slot(&fixture, &frontend, 1));
    fixture.apply([upsert(slice("web", addresses(2).skip(1)))]);
    fixture.settle();
    assert_eq!(fixture.backends_of(&frontend).unwrap(), ["10.1.0.2:5300"]);
    assert_ne!(generation(&fixture, &removed), removed.generation);
    assert_eq!(generation(&fixture, &stays), stays.generation);
    assert_eq!(slot(&fixture, &frontend, 0), stays, "it keeps its ID");

    fixture.apply([upsert(slice("web", addresses(2)))]);
    fixture.settle();
    let back = slot(&fixture, &frontend, 0);
    assert!(back.generation != removed.generation, "flows to its former incarnation stay stale");
}

#[test]
fn serving_udp_backend_keeps_flows_without_new_connections() {
    let mut fixture = web(LARGE, 2);
    let key = frontend("10.96.0.1", UDP);
    let (leaves, stays) = (slot(&fixture, &key, 0), slot(&fixture, &key, 1));
    let service = fixture.services.get(&key).unwrap().unwrap().id;
    let backend = UdpBackend { service, addr: leaves.addr, port: leaves.port };
    let of_any_service = UdpBackend { service: 0, ..backend };
    drop(fixture.reconciler.take_udp_backend_updates());
    let ending = |serving| {
        let mut slice = slice("web", addresses(2));
        let endpoint = &mut slice.endpoints[0];
        (endpoint.ready, endpoint.serving, endpoint.terminating) = (false, serving, true);
        upsert(slice)
    };
    fixture.apply([ending(true)]);
    fixture.settle();
    assert_eq!(fixture.backends_of(&key).unwrap(), ["10.1.0.2:5300"]);
    assert_eq!(generation(&fixture, &leaves), leaves.generation);
    assert_eq!(fixture.reconciler.take_udp_backend_updates(), []);

    fixture.apply([ending(false)]);
    fixture.settle();
    assert_ne!(generation(&fixture, &leaves), leaves.generation);
    assert_eq!(generation(&fixture, &stays), stays.generation);
    assert_eq!(
        fixture.reconciler.take_udp_backend_updates(),
        [backend, of_any_service].map(SocketUpdate::BackendRemoved)
    );

    fixture.apply([upsert(slice("web", addresses(2)))]);
    fixture.settle();
    assert_eq!(
        fixture.reconciler.take_udp_backend_updates(),
        [backend, of_any_service].map(SocketUpdate::BackendAdded)
    );
    fixture.apply([service_removed("web")]);
    fixture.settle();
    let updates = fixture.reconciler.take_udp_backend_updates();
    assert!(updates.len() == 4 && updates.contains(&SocketUpdate::BackendRemoved(backend)), "{updates:?}");
}

/// Changes the objects so that only the local endpoint is eligible.
type Narrowing = fn(&mut StateService, &mut EndpointSlice);

#[test]
fn udp_backend_excluded_by_policy_or_hints_keeps_flows() {
    let internal: Narrowing = |service, _| service.internal_policy = TrafficPolicy::Local;
    let external: Narrowing = |service, _| {
        service.internal_policy = TrafficPolicy::Local;
        service.external_policy = TrafficPolicy::Local;
    };
    let hints: Narrowing = |_, slice| {
        for (endpoint, node) in slice.endpoints.iter_mut().zip(["a", "b"]) {
            let hints = Hints { nodes: Box::new([node.into()]), zones: Box::default() };
            endpoint.hints = Some(Box::new(hints));
        }
    };
    let cluster_ip = frontend("10.96.0.1", UDP);
    let from_outside = ServiceKey { scope: Scope::Outside as u8, ..frontend("192.0.2.1", UDP) };
    for (what, external_ip, narrow, key) in [
        ("internalTrafficPolicy", None, internal, cluster_ip),
        ("externalTrafficPolicy", Some("192.0.2.1"), external, from_outside),
        ("hints", None, hints, cluster_ip),
    ] {
        let external_ips = external_ip.iter().map(|ip| ip.parse().unwrap()).collect();
        let mut desired = StateService { external_ips, ..service("web", &["10.96.0.1"]) };
        let mut slice = slice("web", addresses(2));
        for (endpoint, node) in slice.endpoints.iter_mut().zip(["a", "b"]) {
            endpoint.node_name = Some(node.into());
        }
        let mut fixture = Fixture::new(LARGE);
        fixture.reconciler.set_network(network(), &fixture.store);
        fixture.apply([upsert(desired.clone()), upsert(slice.clone()), SourceEvent::Synced]);
        fixture.settle();
        let far = slot(&fixture, &cluster_ip, 1);
        drop(fixture.reconciler.take_udp_backend_updates());

        narrow(&mut desired, &mut slice);
        fixture.apply([upsert(desired), upsert(slice.clone())]);
        fixture.settle();
        assert_eq!(fixture.backends_of(&key).unwrap(), ["10.1.0.1:5300"], "{what}");
        assert_eq!(generation(&fixture, &far), far.generation, "{what}");
        assert_eq!(fixture.reconciler.take_udp_backend_updates(), [], "{what}");

        slice.endpoints.pop();
        fixture.apply([upsert(slice)]);
        fixture.settle();
        assert_ne!(generation(&fixture, &far), far.generation, "{what}: removed");
        let service = fixture.services.get(&cluster_ip).unwrap().unwrap().id;
        let backend = UdpBackend { service, addr: far.addr, port: far.port };
        assert_eq!(
            fixture.reconciler.take_udp_backend_updates(),
            [backend, UdpBackend { service: 0, ..backend }].map(SocketUpdate::BackendRemoved),
            "{what}"
        );
    }
}

#[test]
fn service_that_loses_a_backend_of_two_services_makes_only_its_flows_stale() {
    let mut fixture = web(LARGE, 1);
    fixture.apply([upsert(service("too", &["10.96.0.2"])), upsert(slice("too", addresses(1)))]);
    fixture.settle();
    drop(fixture.reconciler.take_udp_backend_updates());
    let (web, too) = (frontend("10.96.0.1", UDP), frontend("10.96.0.2", UDP));
    let (of_web, of_too) = (slot(&fixture, &web, 0), slot(&fixture, &too, 0));
    assert_eq!((of_web.addr, of_web.port), (of_too.addr, of_too.port));
    assert_ne!(of_web.id, of_too.id);
    let service = fixture.services.get(&web).unwrap().unwrap().id;
    fixture.apply([upsert(slice("web", addresses(2).skip(1)))]);
    fixture.settle();
    assert_ne!(generation(&fixture, &of_web), of_web.generation);
    assert_eq!(generation(&fixture, &of_too), of_too.generation);
    let removed = SocketUpdate::BackendRemoved(UdpBackend { service, addr: of_web.addr, port: of_web.port });
    let updates = fixture.reconciler.take_udp_backend_updates();
    let removals: Vec<_> =
        updates.into_iter().filter(|it| matches!(it, SocketUpdate::BackendRemoved(_))).collect();
    assert_eq!(removals, [removed], "sockets without a known service stay: the other service has it");
    fixture.apply([service_removed("too")]);
    fixture.settle();
    assert_ne!(generation(&fixture, &of_too), of_too.generation);
}

/// Before, an ID was that of a backend, whatever services had it.
#[test]
fn frontend_passed_to_another_service_is_never_missing_and_keeps_flows() {
    let mut fixture = web(LARGE, 1);
    let key = frontend("10.96.0.1", UDP);
    let backend = slot(&fixture, &key, 0);
    // the checker rejects the removal of a desired row
    fixture.apply([
        service_removed("web"),
        upsert(service("heir", &["10.96.0.1"])),
        upsert(slice("heir", addresses(1))),
    ]);
    fixture.settle();
    assert_eq!(slot(&fixture, &key, 0), backend);
    assert_eq!(generation(&fixture, &backend), backend.generation);
}

#[test]
fn first_service_owns_contested_frontend_until_deleted() {
    let mut fixture = web(LARGE, 1);
    fixture.apply([upsert(service("late", &["10.96.0.1"])), upsert(slice("late", ["10.9.9.9".to_owned()]))]);
    fixture.settle();
    let key = frontend("10.96.0.1", TCP);
    assert_eq!(fixture.backends_of(&key).unwrap(), ["10.1.0.1:5300"]);
    assert!(
        fixture.problems().contains(
            &"Service default/late: 10.96.0.1 port 53/TCP is already used by Service default/web".to_owned()
        ),
        "{:?}",
        fixture.problems()
    );
    fixture.apply([service_removed("web")]);
    fixture.settle();
    assert_eq!(fixture.backends_of(&key).unwrap(), ["10.9.9.9:5300"]);
    assert_eq!(fixture.problems(), [] as [&str; 0]);
}

#[test]
fn changed_backend_writes_only_its_service() {
    let mut fixture = web(LARGE, 10_000);
    for n in 0..200 {
        let (name, ip) = (format!("other-{n}"), format!("10.97.0.{n}"));
        fixture.apply([upsert(service(&name, &[&ip])), upsert(slice(&name, addresses(3)))]);
    }
    fixture.settle();
    let writes = fixture.writes();
    fixture.apply([upsert(slice("web", addresses(9_999)))]);
    fixture.settle();
    // on each of two ports: the range, the frontend, and the generation of the removed backend
    assert_eq!(fixture.writes() - writes, 2 * (9_999 + 1 + 1));
}

#[test]
fn full_backend_table_keeps_existing_rows_and_names_missing_service() {
    let mut fixture = web(Capacities { frontends: 16, slots: 8, backends: 64, ..LARGE }, 2);
    fixture.apply([
        upsert(service("large", &["10.96.0.2"])),
        upsert(slice("large", addresses(5))),
        upsert(service("small", &["10.96.0.3"])),
        upsert(slice("small", addresses(1))),
    ]);
    for _ in 0..3 {
        fixture.work();
    }
    assert_eq!(fixture.backends_of(&frontend("10.96.0.2", TCP)), None);
    assert_eq!(
        fixture.backends_of(&frontend("10.96.0.3", UDP)).unwrap(),
        ["10.1.0.1:5300"],
        "other Services are still written"
    );
    let problems = fixture.problems();
    assert!(problems[0].starts_with("Service default/large: table BACKENDS is full"), "{problems:?}");

    fixture.apply([upsert(slice("web", addresses(6)))]);
    fixture.work();
    assert_eq!(
        fixture.backends_of(&frontend("10.96.0.1", TCP)).unwrap().len(),
        2,
        "the last valid state stays"
    );
    fixture.apply([upsert(slice("web", addresses(2))), upsert(slice("large", addresses(1)))]);
    fixture.settle();
    assert_eq!(fixture.backends_of(&frontend("10.96.0.2", TCP)).unwrap().len(), 1);
    assert_eq!(fixture.problems(), [] as [&str; 0]);
}

#[test]
fn full_frontend_table_names_missing_service() {
    let mut fixture = web(Capacities { frontends: 3, slots: 64, backends: 64, ..LARGE }, 1);
    fixture.apply([upsert(service("more", &["10.96.0.2"])), upsert(slice("more", addresses(1)))]);
    fixture.work();
    let problems = fixture.problems();
    assert!(
        problems[0].starts_with("Service default/more: table SERVICES is full (3 entries)"),
        "{problems:?}"
    );
}

#[test]
fn service_views_show_table_content() {
    let mut fixture = web(LARGE, 2);
    let views = fixture.reconciler.services(&fixture.store);
    assert_eq!(views.len(), 2);
    assert_eq!((views[0].name.as_str(), views[0].port, views[0].protocol.as_str()), ("web", 53, "TCP"));
    assert_eq!(views[0].cluster_ips, ["10.96.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(views[0].backends.len(), 2);
    assert_eq!(views[0].generation, 1);
    fixture.apply([upsert(service("new", &["10.96.0.9"]))]);
    assert_eq!(fixture.reconciler.services(&fixture.store).len(), 2, "it is not in the tables yet");
    let used: Vec<_> =
        fixture.reconciler.tables().into_iter().map(|table| (table.name, table.used)).collect();
    let expected = [
        ("ENDPOINTS", 0),
        ("POD_SOURCES", 0),
        ("ROUTES", 0),
        ("SERVICES", 3),
        ("BACKENDS", 4),
        ("BACKEND_GENERATIONS", 4),
        ("SOURCE_RANGES", 0),
    ];
    assert_eq!(used, expected.map(|(name, used)| (name.to_owned(), used)));
}
