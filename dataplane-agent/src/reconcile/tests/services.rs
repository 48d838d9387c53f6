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

/// A world with service `web` at 10.96.0.1 and these backends.
fn web(room: Room, backends: usize) -> World {
    let mut world = World::new(room);
    world.apply([
        upsert(service("web", &["10.96.0.1"])),
        upsert(slice("web", addresses(backends))),
        SourceEvent::Synced,
    ]);
    world.settle();
    world
}

fn generation(world: &World, backend: &BackendSlot) -> u32 {
    world.generations.get(&backend.id).unwrap().unwrap()
}

fn slot(world: &World, frontend: &ServiceKey, index: u32) -> BackendSlot {
    let row = world.services.get(frontend).unwrap().unwrap();
    world.backends.get(&(row.first_slot + index)).unwrap().unwrap()
}

#[test]
fn a_service_leads_to_its_backends_on_every_port() {
    let world = web(PLENTY, 2);
    for protocol in [TCP, UDP] {
        let behind = world.behind(&frontend("10.96.0.1", protocol)).unwrap();
        assert_eq!(behind, ["10.1.0.1:5300", "10.1.0.2:5300"]);
    }
    let ids: Vec<_> = world.services.entries().unwrap().into_iter().map(|(_, row)| row.id).collect();
    assert!(ids[0] != ids[1] && !ids.contains(&0), "each port has its number: {ids:?}");
    assert_ne!(
        slot(&world, &frontend("10.96.0.1", TCP), 0).id,
        slot(&world, &frontend("10.96.0.1", UDP), 0).id,
        "a backend is an address, a port and a protocol"
    );
}

#[test]
fn a_service_without_backends_is_there_and_says_so() {
    let world = web(PLENTY, 0);
    let row = world.services.get(&frontend("10.96.0.1", TCP)).unwrap().unwrap();
    assert_eq!((row.count, row.first_slot), (0, 0));
}

#[test]
fn a_backend_that_is_gone_makes_its_flows_stale_and_no_others() {
    let mut world = web(PLENTY, 2);
    let frontend = frontend("10.96.0.1", UDP);
    let (goes, stays) = (slot(&world, &frontend, 0), slot(&world, &frontend, 1));
    world.apply([upsert(slice("web", addresses(2).skip(1)))]);
    world.settle();
    assert_eq!(world.behind(&frontend).unwrap(), ["10.1.0.2:5300"]);
    assert_ne!(generation(&world, &goes), goes.generation);
    assert_eq!(generation(&world, &stays), stays.generation);
    assert_eq!(slot(&world, &frontend, 0), stays, "it keeps its number");

    world.apply([upsert(slice("web", addresses(2)))]);
    world.settle();
    let back = slot(&world, &frontend, 0);
    assert!(back.generation != goes.generation, "flows of its former life stay stale");
}

#[test]
fn a_udp_backend_that_serves_keeps_its_flows_though_nobody_new_gets_it() {
    let mut world = web(PLENTY, 2);
    let key = frontend("10.96.0.1", UDP);
    let (leaves, stays) = (slot(&world, &key, 0), slot(&world, &key, 1));
    let backend = UdpBackend { addr: leaves.addr, port: leaves.port };
    drop(world.agent.take_moved());
    let ending = |serving| {
        let mut slice = slice("web", addresses(2));
        let endpoint = &mut slice.endpoints[0];
        (endpoint.ready, endpoint.serving, endpoint.terminating) = (false, serving, true);
        upsert(slice)
    };
    world.apply([ending(true)]);
    world.settle();
    assert_eq!(world.behind(&key).unwrap(), ["10.1.0.2:5300"]);
    assert_eq!(generation(&world, &leaves), leaves.generation);
    assert_eq!(world.agent.take_moved(), []);

    world.apply([ending(false)]);
    world.settle();
    assert_ne!(generation(&world, &leaves), leaves.generation);
    assert_eq!(generation(&world, &stays), stays.generation);
    assert_eq!(world.agent.take_moved(), [SocketUpdate::Gone(backend)]);

    world.apply([upsert(slice("web", addresses(2)))]);
    world.settle();
    assert_eq!(world.agent.take_moved(), [SocketUpdate::Back(backend)]);
    world.apply([service_gone("web")]);
    world.settle();
    let gone = world.agent.take_moved();
    assert!(gone.len() == 2 && gone.contains(&SocketUpdate::Gone(backend)), "{gone:?}");
}

/// From now on the frontend leads to the endpoint on this node alone.
type Narrowing = fn(&mut StateService, &mut EndpointSlice);

#[test]
fn a_udp_backend_that_a_policy_or_hints_leave_out_keeps_its_flows() {
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
        let mut wanted = StateService { external_ips, ..service("web", &["10.96.0.1"]) };
        let mut slice = slice("web", addresses(2));
        for (endpoint, node) in slice.endpoints.iter_mut().zip(["a", "b"]) {
            endpoint.node_name = Some(node.into());
        }
        let mut world = World::new(PLENTY);
        world.agent.set_network(network(), &world.store);
        world.apply([upsert(wanted.clone()), upsert(slice.clone()), SourceEvent::Synced]);
        world.settle();
        let far = slot(&world, &cluster_ip, 1);
        drop(world.agent.take_moved());

        narrow(&mut wanted, &mut slice);
        world.apply([upsert(wanted), upsert(slice.clone())]);
        world.settle();
        assert_eq!(world.behind(&key).unwrap(), ["10.1.0.1:5300"], "{what}");
        assert_eq!(generation(&world, &far), far.generation, "{what}");
        assert_eq!(world.agent.take_moved(), [], "{what}");

        slice.endpoints.pop();
        world.apply([upsert(slice)]);
        world.settle();
        assert_ne!(generation(&world, &far), far.generation, "{what}: it is gone");
        let backend = UdpBackend { addr: far.addr, port: far.port };
        assert_eq!(world.agent.take_moved(), [SocketUpdate::Gone(backend)], "{what}");
    }
}

#[test]
fn a_backend_of_two_services_is_gone_when_both_have_lost_it() {
    let mut world = web(PLENTY, 1);
    world.apply([upsert(service("too", &["10.96.0.2"])), upsert(slice("too", addresses(1)))]);
    world.settle();
    let backend = slot(&world, &frontend("10.96.0.1", TCP), 0);
    assert_eq!(backend, slot(&world, &frontend("10.96.0.2", TCP), 0));
    world.apply([service_gone("web")]);
    world.settle();
    assert_eq!(generation(&world, &backend), backend.generation);
    world.apply([service_gone("too")]);
    world.settle();
    assert_ne!(generation(&world, &backend), backend.generation);
}

#[test]
fn a_frontend_that_changes_hands_is_never_without_a_service_and_keeps_its_flows() {
    let mut world = web(PLENTY, 1);
    let key = frontend("10.96.0.1", UDP);
    let backend = slot(&world, &key, 0);
    // the checker refuses a removal of what is wanted
    world.apply([
        service_gone("web"),
        upsert(service("heir", &["10.96.0.1"])),
        upsert(slice("heir", addresses(1))),
    ]);
    world.settle();
    assert_eq!(slot(&world, &key, 0), backend);
    assert_eq!(generation(&world, &backend), backend.generation);
}

#[test]
fn who_had_a_frontend_first_keeps_it_until_it_goes() {
    let mut world = web(PLENTY, 1);
    world.apply([upsert(service("late", &["10.96.0.1"])), upsert(slice("late", ["10.9.9.9".to_owned()]))]);
    world.settle();
    let key = frontend("10.96.0.1", TCP);
    assert_eq!(world.behind(&key).unwrap(), ["10.1.0.1:5300"]);
    assert!(
        world.problems().contains(
            &"Service default/late: 10.96.0.1 port 53/TCP is held by Service default/web".to_owned()
        ),
        "{:?}",
        world.problems()
    );
    world.apply([service_gone("web")]);
    world.settle();
    assert_eq!(world.behind(&key).unwrap(), ["10.9.9.9:5300"]);
    assert_eq!(world.problems(), [] as [&str; 0]);
}

#[test]
fn one_backend_of_ten_thousand_costs_its_service_and_no_other() {
    let mut world = web(PLENTY, 10_000);
    for n in 0..200 {
        let (name, ip) = (format!("other-{n}"), format!("10.97.0.{n}"));
        world.apply([upsert(service(&name, &[&ip])), upsert(slice(&name, addresses(3)))]);
    }
    world.settle();
    let writes = world.writes();
    world.apply([upsert(slice("web", addresses(9_999)))]);
    world.settle();
    // on each of two ports: the range, its frontend, and the generation of the one that is gone
    assert_eq!(world.writes() - writes, 2 * (9_999 + 1 + 1));
}

#[test]
fn a_full_table_keeps_what_is_there_and_names_what_is_not() {
    let mut world = web(Room { frontends: 16, slots: 8, backends: 64, ..PLENTY }, 2);
    world.apply([
        upsert(service("large", &["10.96.0.2"])),
        upsert(slice("large", addresses(5))),
        upsert(service("small", &["10.96.0.3"])),
        upsert(slice("small", addresses(1))),
    ]);
    for _ in 0..3 {
        world.work();
    }
    assert_eq!(world.behind(&frontend("10.96.0.2", TCP)), None);
    assert_eq!(world.behind(&frontend("10.96.0.3", UDP)).unwrap(), ["10.1.0.1:5300"], "the rest goes on");
    let problems = world.problems();
    assert!(problems[0].starts_with("Service default/large: table BACKENDS is full"), "{problems:?}");

    world.apply([upsert(slice("web", addresses(6)))]);
    world.work();
    assert_eq!(world.behind(&frontend("10.96.0.1", TCP)).unwrap().len(), 2, "the last good state stays");
    world.apply([upsert(slice("web", addresses(2))), upsert(slice("large", addresses(1)))]);
    world.settle();
    assert_eq!(world.behind(&frontend("10.96.0.2", TCP)).unwrap().len(), 1);
    assert_eq!(world.problems(), [] as [&str; 0]);
}

#[test]
fn a_full_frontend_table_names_the_service() {
    let mut world = web(Room { frontends: 3, slots: 64, backends: 64, ..PLENTY }, 1);
    world.apply([upsert(service("more", &["10.96.0.2"])), upsert(slice("more", addresses(1)))]);
    world.work();
    let problems = world.problems();
    assert!(
        problems[0].starts_with("Service default/more: table SERVICES is full (3 entries)"),
        "{problems:?}"
    );
}

#[test]
fn a_restart_keeps_numbers_and_writes_nothing() {
    let mut world = web(PLENTY, 3);
    let rows = world.services.entries().unwrap();
    let writes = world.writes();
    world.restart();
    world.replay();
    world.settle();
    assert_eq!(world.writes(), writes);
    assert_eq!(world.agent.changes(), 0);
    world.apply([upsert(slice("web", addresses(4)))]);
    world.settle();
    for (key, before) in rows.into_iter().filter(|(key, _)| *key != ServiceKey::of_address(key.addr)) {
        let after = world.services.get(&key).unwrap().unwrap();
        assert_eq!((after.id, after.generation), (before.id, before.generation + 1));
    }
}

#[test]
fn what_went_while_the_agent_was_away_goes_only_when_everything_is_known() {
    let mut world = web(PLENTY, 2);
    let frontend = frontend("10.96.0.1", TCP);
    let backend = slot(&world, &frontend, 0);
    world.store = Store::default();
    world.restart();
    world.settle();
    assert!(world.behind(&frontend).is_some(), "nothing is deleted before the first full sync");
    world.replay();
    world.settle();
    assert!(world.behind(&frontend).is_some(), "it may be a port of a pod that is not known yet");
    world.agent.pods_loaded();
    world.settle();
    assert_eq!(world.behind(&frontend), None);
    assert_ne!(generation(&world, &backend), backend.generation);
}

#[test]
fn a_service_keeps_its_backends_until_its_slices_are_heard_of() {
    let mut world = web(PLENTY, 2);
    world.store = Store::default();
    world.restart();
    // the list of services is here, that of slices is not
    world.apply([upsert(service("web", &["10.96.0.1"]))]);
    world.settle();
    let frontend = frontend("10.96.0.1", TCP);
    assert_eq!(world.behind(&frontend).unwrap(), ["10.1.0.1:5300", "10.1.0.2:5300"]);
    assert_eq!(world.agent.changes(), 0, "nothing was written");

    world.apply([SourceEvent::Synced]);
    world.settle();
    assert!(world.behind(&frontend).unwrap().is_empty(), "it has none indeed");
}

#[test]
fn a_backend_that_went_as_the_agent_died_is_made_stale_by_the_next() {
    let mut world = web(PLENTY, 2);
    let frontend = frontend("10.96.0.1", UDP);
    let goes = slot(&world, &frontend, 0);
    // two ports: a slot and a frontend each, and then no generation
    world.faults.fail_after(4);
    world.apply([upsert(slice("web", addresses(2).skip(1)))]);
    world.work();
    assert_eq!(world.behind(&frontend).unwrap(), ["10.1.0.2:5300"]);
    assert_eq!(generation(&world, &goes), goes.generation);
    world.restart();
    world.agent.pods_loaded();
    world.replay();
    world.settle();
    assert_ne!(generation(&world, &goes), goes.generation);
}

/// A world whose tables were damaged by `damage` while no agent was there.
fn damaged(damage: impl FnOnce(&mut World)) -> World {
    let mut world = web(PLENTY, 3);
    world.apply([upsert(service("good", &["10.96.0.2"])), upsert(slice("good", addresses(2)))]);
    world.settle();
    damage(&mut world);
    let broken = frontend("10.96.0.1", TCP);
    world.checker.lock().unwrap().broken.insert(broken);
    world.restart();
    world
}

fn assert_repaired(mut world: World, writes: u64) {
    let good = frontend("10.96.0.2", TCP);
    let untouched = world.services.get(&good).unwrap();
    world.replay();
    world.settle();
    let behind = world.behind(&frontend("10.96.0.1", TCP)).unwrap();
    assert_eq!(behind, ["10.1.0.1:5300", "10.1.0.2:5300", "10.1.0.3:5300"]);
    assert_eq!(world.services.get(&good).unwrap(), untouched, "the others are not touched");
    assert_eq!(world.agent.changes(), writes);
}

fn change_row(world: &mut World, change: impl FnOnce(&mut Service, &Service)) {
    let (broken, good) = (frontend("10.96.0.1", TCP), frontend("10.96.0.2", TCP));
    let mut row = world.services.get(&broken).unwrap().unwrap();
    let good = world.services.get(&good).unwrap().unwrap();
    change(&mut row, &good);
    world.services.insert(&broken, &row.with_checksum(&broken)).unwrap();
}

/// A range of three, a row, and the number of the backend that only the broken row names.
const REPAIR: u64 = 3 + 1 + 1;

#[test]
fn a_row_that_overlaps_another_is_rewritten() {
    let world = damaged(|world| {
        change_row(world, |row, good| {
            row.first_slot = good.first_slot + 1;
            row.count = 3;
        });
    });
    assert_repaired(world, REPAIR);
}

#[test]
fn a_row_beyond_the_table_is_rewritten() {
    let world = damaged(|world| {
        change_row(world, |row, _| (row.first_slot, row.count) = (PLENTY.slots - 1, u32::MAX));
    });
    assert_repaired(world, REPAIR);
}

#[test]
fn a_row_over_the_whole_table_leaves_room_for_its_repair() {
    // the number is taken back and given again while the range rests
    let world = damaged(|world| {
        change_row(world, |row, _| (row.first_slot, row.count) = (0, PLENTY.slots));
    });
    assert_repaired(world, REPAIR + 2);
}

#[test]
fn a_row_that_is_not_sealed_is_rewritten() {
    let world = damaged(|world| {
        let broken = frontend("10.96.0.1", TCP);
        let mut row = world.services.get(&broken).unwrap().unwrap();
        row.checksum ^= 1;
        world.services.insert(&broken, &row).unwrap();
    });
    assert_repaired(world, 3 + 1);
}

#[test]
fn a_slot_that_is_not_what_it_should_be_is_rewritten() {
    let world = damaged(|world| {
        let row = world.services.get(&frontend("10.96.0.1", TCP)).unwrap().unwrap();
        let mut slot = world.backends.get(&row.first_slot).unwrap().unwrap();
        slot.generation += 2;
        world.backends.insert(&row.first_slot, &slot).unwrap();
    });
    assert_repaired(world, REPAIR);
}

#[test]
fn an_audit_finds_and_repairs_what_somebody_else_changed() {
    let mut world = web(PLENTY, 2);
    let key = frontend("10.96.0.1", TCP);
    let row = world.services.get(&key).unwrap().unwrap();
    let behind = world.behind(&key);
    let audit = |world: &mut World| {
        world.pass(Duration::from_secs(60));
        while !world.agent.audit().unwrap() {}
        world.settle();
    };
    audit(&mut world);
    assert_eq!(world.agent.statistics().drift, 0);

    world.services.remove(&key).unwrap();
    audit(&mut world);
    assert_eq!((world.behind(&key), world.agent.statistics().drift), (behind.clone(), 1));

    let row = world.services.get(&key).unwrap().unwrap_or(row);
    world.backends.remove(&row.first_slot).unwrap();
    audit(&mut world);
    assert_eq!((world.behind(&key), world.agent.statistics().drift), (behind, 2));
}

#[test]
fn the_list_of_services_shows_what_is_in_the_tables() {
    let mut world = web(PLENTY, 2);
    let views = world.agent.services(&world.store);
    assert_eq!(views.len(), 2);
    assert_eq!((views[0].name.as_str(), views[0].port, views[0].protocol.as_str()), ("web", 53, "TCP"));
    assert_eq!(views[0].cluster_ips, ["10.96.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(views[0].backends.len(), 2);
    assert_eq!(views[0].generation, 1);
    world.apply([upsert(service("new", &["10.96.0.9"]))]);
    assert_eq!(world.agent.services(&world.store).len(), 2, "it is not in the tables yet");
    let used: Vec<_> = world.agent.tables().into_iter().map(|table| (table.name, table.used)).collect();
    let expected = [
        ("ENDPOINTS", 0),
        ("ROUTES", 0),
        ("SERVICES", 3),
        ("BACKENDS", 4),
        ("BACKEND_GENERATIONS", 4),
        ("SOURCE_RANGES", 0),
    ];
    assert_eq!(used, expected.map(|(name, used)| (name.to_owned(), used)));
}
