//! Frontends with source ranges, with separate rows for external clients, and node ports.

use super::{services::addresses, *};

const TCP: TransportProtocol = TransportProtocol::Tcp;
const UDP: TransportProtocol = TransportProtocol::Udp;

#[test]
fn full_source_range_table_keeps_only_restricted_frontends() {
    let mut fixture = Fixture::new(Capacities { source_ranges: 2, ..LARGE });
    let web_service = |balancers: &[&str], ranges: &[&str]| StateService {
        load_balancer_ips: balancers.iter().map(|ip| ip.parse().unwrap()).collect(),
        source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..service("web", &["10.96.0.1"])
    };
    // one entry per port
    fixture.apply([
        upsert(web_service(&["192.0.2.1"], &["198.51.100.0/24"])),
        upsert(slice("web", addresses(1))),
        SourceEvent::Synced,
    ]);
    fixture.settle();
    let row = |fixture: &Fixture, ip: &str, protocol| fixture.services.get(&frontend(ip, protocol)).unwrap();
    let restricted = [TCP, UDP].map(|protocol| row(&fixture, "192.0.2.1", protocol));
    assert!(restricted.iter().flatten().all(|row| row.flags & ServiceFlags::SOURCE_RANGES != 0));

    fixture.apply([
        upsert(web_service(&["192.0.2.1", "192.0.2.2"], &["198.51.100.0/24", "203.0.113.0/24"])),
        upsert(slice("web", addresses(2))),
    ]);
    fixture.work();
    for protocol in [TCP, UDP] {
        let backends_of = fixture.backends_of(&frontend("10.96.0.1", protocol)).unwrap();
        assert_eq!(backends_of, ["10.1.0.1:5300", "10.1.0.2:5300"], "without source ranges");
        assert_eq!(row(&fixture, "192.0.2.2", protocol), None);
    }
    assert_eq!([TCP, UDP].map(|protocol| row(&fixture, "192.0.2.1", protocol)), restricted);
    assert_eq!(fixture.problems(), ["Service default/web: table SOURCE_RANGES is full (2 entries)"]);

    fixture.apply([upsert(web_service(&["192.0.2.1", "192.0.2.2"], &["198.51.100.0/24"]))]);
    fixture.settle();
    for (ip, protocol) in [("192.0.2.1", TCP), ("192.0.2.2", TCP), ("192.0.2.1", UDP), ("192.0.2.2", UDP)] {
        assert_eq!(fixture.backends_of(&frontend(ip, protocol)).unwrap().len(), 2);
        assert_ne!(row(&fixture, ip, protocol).unwrap().flags & ServiceFlags::SOURCE_RANGES, 0);
    }
}

/// Service `web` with all frontend kinds, and a slice with one local and one remote endpoint.
fn all_frontends(external_policy: TrafficPolicy) -> [SourceEvent; 2] {
    let mut service = StateService {
        external_ips: vec!["192.0.2.1".parse().unwrap()],
        load_balancer_ips: vec!["192.0.2.2".parse().unwrap()],
        external_policy,
        ..service("web", &["10.96.0.1"])
    };
    service.ports.iter_mut().for_each(|port| port.node_port = Some(30_053));
    let mut slice = slice("web", addresses(2));
    slice.endpoints[0].node_name = Some("a".into());
    [upsert(service), upsert(slice)]
}

/// Number of rows for external clients, and of rows that refer to them.
fn external_rows(fixture: &Fixture) -> (usize, usize) {
    let rows = fixture.services.entries().unwrap();
    let own = rows.iter().filter(|(key, _)| key.scope == Scope::Outside as u8).count();
    (own, rows.iter().filter(|(_, row)| row.flags & ServiceFlags::OUTSIDE != 0).count())
}

#[test]
fn row_for_external_clients_exists_after_every_write() {
    let mut fixture = Fixture::new(LARGE);
    fixture.reconciler.set_network(network(), &fixture.store);
    fixture.reconciler.pods_loaded();
    fixture.apply(all_frontends(TrafficPolicy::Cluster).into_iter().chain([SourceEvent::Synced]));
    fixture.settle();
    // the checker runs after each write
    for failing in 0..30 {
        for (policy, expected) in [(TrafficPolicy::Local, (6, 6)), (TrafficPolicy::Cluster, (0, 0))] {
            fixture.faults.fail([failing]);
            fixture.apply(all_frontends(policy));
            fixture.work();
            fixture.settle();
            assert_eq!(external_rows(&fixture), expected, "{policy:?}, write {failing} fails");
        }
    }
    fixture.apply(all_frontends(TrafficPolicy::Local));
    fixture.settle();
    fixture.apply([service_removed("web")]);
    fixture.settle();
    assert_eq!(fixture.services.entries().unwrap().len(), 0);
}

#[test]
fn node_port_is_a_host_port_while_a_service_has_it() {
    let mut fixture = Fixture::new(LARGE);
    let ported = |name: &str, ip: &str| {
        let mut service = service(name, &[ip]);
        service.ports.iter_mut().for_each(|port| port.node_port = Some(40_053));
        upsert(service)
    };
    fixture.apply([ported("web", "10.96.0.1"), ported("late", "10.96.0.2")]);
    assert!(fixture.reconciler.take_host_ports_changed() && !fixture.reconciler.take_host_ports_changed());
    assert_eq!(fixture.reconciler.host_ports().ports, [40_053].into());
    assert!(!fixture.reconciler.host_ports().complete, "pods may have host ports");
    fixture.apply([SourceEvent::Synced]);
    fixture.reconciler.pods_loaded();
    assert!(fixture.reconciler.take_host_ports_changed() && fixture.reconciler.host_ports().complete);

    fixture.apply([service_removed("web")]);
    assert!(!fixture.reconciler.take_host_ports_changed(), "another Service takes the frontend");
    fixture.apply([service_removed("late")]);
    assert!(fixture.reconciler.take_host_ports_changed() && fixture.reconciler.host_ports().ports.is_empty());
}

/// Whether pings to the address are answered: a row of the address has [`ServiceFlags::READY`].
fn answers_ping(fixture: &Fixture, ip: &str) -> bool {
    let addr = ip.parse::<std::net::IpAddr>().unwrap().into();
    let rows =
        [ServiceKey::of_address(addr), ServiceKey::of_ping(addr)].map(|key| fixture.services.get(&key));
    rows.into_iter().filter_map(Result::unwrap).any(|row| row.flags & ServiceFlags::READY != 0)
}

#[test]
fn ping_is_answered_while_any_service_of_the_address_has_a_backend() {
    let mut fixture = Fixture::new(LARGE);
    let shared = |name: &str, ip: &str, port: u16| {
        let mut service =
            StateService { load_balancer_ips: vec!["192.0.2.1".parse().unwrap()], ..service(name, &[ip]) };
        service.ports.truncate(1);
        service.ports[0].port = port;
        upsert(service)
    };
    fixture.apply([
        shared("one", "10.96.0.1", 53),
        shared("two", "10.96.0.2", 54),
        upsert(slice("one", addresses(1))),
        upsert(slice("two", addresses(1))),
        SourceEvent::Synced,
    ]);
    fixture.settle();
    assert!(["10.96.0.1", "10.96.0.2", "192.0.2.1"].iter().all(|ip| answers_ping(&fixture, ip)));
    assert_eq!(fixture.problems(), [""; 0], "Services may share an address");

    fixture.apply([upsert(slice("one", addresses(0)))]);
    fixture.settle();
    let answers =
        |fixture: &Fixture| ["10.96.0.1", "10.96.0.2", "192.0.2.1"].map(|ip| answers_ping(fixture, ip));
    assert_eq!(answers(&fixture), [false, true, true]);
    fixture.apply([upsert(slice("two", addresses(0)))]);
    fixture.settle();
    assert_eq!(answers(&fixture), [false, false, false]);
    fixture.apply([upsert(slice("one", addresses(2)))]);
    fixture.settle();
    assert_eq!(answers(&fixture), [true, false, true]);

    // after a restart nothing changes before all slices are known
    fixture.restart();
    let writes = fixture.writes();
    fixture.apply([shared("one", "10.96.0.1", 53), shared("two", "10.96.0.2", 54)]);
    fixture.settle();
    assert_eq!(answers(&fixture), [true, false, true]);
    assert_eq!(fixture.writes(), writes);
    fixture.apply([
        upsert(slice("one", addresses(2))),
        upsert(slice("two", addresses(0))),
        SourceEvent::Synced,
    ]);
    fixture.settle();
    assert_eq!(answers(&fixture), [true, false, true]);
}
