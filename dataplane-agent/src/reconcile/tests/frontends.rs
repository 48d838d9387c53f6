//! Where a service is: frontends that are guarded, apart for clients from outside, or ports of the host.

use super::{services::addresses, *};

const TCP: TransportProtocol = TransportProtocol::Tcp;
const UDP: TransportProtocol = TransportProtocol::Udp;

#[test]
fn source_ranges_without_room_keep_what_they_guard_and_nothing_else() {
    let mut world = World::new(Room { source_ranges: 2, ..PLENTY });
    let wanted = |balancers: &[&str], ranges: &[&str]| StateService {
        load_balancer_ips: balancers.iter().map(|ip| ip.parse().unwrap()).collect(),
        source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..service("web", &["10.96.0.1"])
    };
    // one for each port
    world.apply([
        upsert(wanted(&["192.0.2.1"], &["198.51.100.0/24"])),
        upsert(slice("web", addresses(1))),
        SourceEvent::Synced,
    ]);
    world.settle();
    let row = |world: &World, ip: &str, protocol| world.services.get(&frontend(ip, protocol)).unwrap();
    let guarded = [TCP, UDP].map(|protocol| row(&world, "192.0.2.1", protocol));
    assert!(guarded.iter().flatten().all(|row| row.flags & ServiceFlags::SOURCE_RANGES != 0));

    world.apply([
        upsert(wanted(&["192.0.2.1", "192.0.2.2"], &["198.51.100.0/24", "203.0.113.0/24"])),
        upsert(slice("web", addresses(2))),
    ]);
    world.work();
    for protocol in [TCP, UDP] {
        let behind = world.behind(&frontend("10.96.0.1", protocol)).unwrap();
        assert_eq!(behind, ["10.1.0.1:5300", "10.1.0.2:5300"], "guarded by nobody");
        assert_eq!(row(&world, "192.0.2.2", protocol), None);
    }
    assert_eq!([TCP, UDP].map(|protocol| row(&world, "192.0.2.1", protocol)), guarded);
    assert_eq!(world.problems(), ["Service default/web: table SOURCE_RANGES is full (2 entries)"]);

    world.apply([upsert(wanted(&["192.0.2.1", "192.0.2.2"], &["198.51.100.0/24"]))]);
    world.settle();
    for (ip, protocol) in [("192.0.2.1", TCP), ("192.0.2.2", TCP), ("192.0.2.1", UDP), ("192.0.2.2", UDP)] {
        assert_eq!(world.behind(&frontend(ip, protocol)).unwrap().len(), 2);
        assert_ne!(row(&world, ip, protocol).unwrap().flags & ServiceFlags::SOURCE_RANGES, 0);
    }
}

/// Service `web` on every frontend there is, and its slice with an endpoint on this node and one elsewhere.
fn everywhere(external_policy: TrafficPolicy) -> [SourceEvent; 2] {
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

/// Rows of clients from outside, and rows that send them there.
fn outside(world: &World) -> (usize, usize) {
    let rows = world.services.entries().unwrap();
    let own = rows.iter().filter(|(key, _)| key.scope == Scope::Outside as u8).count();
    (own, rows.iter().filter(|(_, row)| row.flags & ServiceFlags::OUTSIDE != 0).count())
}

#[test]
fn who_is_sent_to_a_row_of_its_own_finds_it_after_every_write() {
    let mut world = World::new(PLENTY);
    world.agent.set_network(network(), &world.store);
    world.agent.pods_loaded();
    world.apply(everywhere(TrafficPolicy::Cluster).into_iter().chain([SourceEvent::Synced]));
    world.settle();
    // the checker looks after each write
    for failing in 0..30 {
        for (policy, expected) in [(TrafficPolicy::Local, (6, 6)), (TrafficPolicy::Cluster, (0, 0))] {
            world.faults.fail([failing]);
            world.apply(everywhere(policy));
            world.work();
            world.settle();
            assert_eq!(outside(&world), expected, "{policy:?}, write {failing} fails");
        }
    }
    world.apply(everywhere(TrafficPolicy::Local));
    world.settle();
    world.apply([service_gone("web")]);
    world.settle();
    assert_eq!(world.services.entries().unwrap().len(), 0);
}

#[test]
fn a_node_port_is_the_hosts_as_long_as_a_service_has_it() {
    let mut world = World::new(PLENTY);
    let ported = |name: &str, ip: &str| {
        let mut service = service(name, &[ip]);
        service.ports.iter_mut().for_each(|port| port.node_port = Some(40_053));
        upsert(service)
    };
    world.apply([ported("web", "10.96.0.1"), ported("late", "10.96.0.2")]);
    assert!(world.agent.take_host_ports_changed() && !world.agent.take_host_ports_changed());
    assert_eq!(world.agent.host_ports().ports, [40_053].into());
    assert!(!world.agent.host_ports().complete, "pods may have others");
    world.apply([SourceEvent::Synced]);
    world.agent.pods_loaded();
    assert!(world.agent.take_host_ports_changed() && world.agent.host_ports().complete);

    world.apply([service_gone("web")]);
    assert!(!world.agent.take_host_ports_changed(), "it has an heir");
    world.apply([service_gone("late")]);
    assert!(world.agent.take_host_ports_changed() && world.agent.host_ports().ports.is_empty());
}
