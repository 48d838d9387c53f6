//! What an agent makes of the tables that an earlier one left.

use super::{services::*, *};

const TCP: TransportProtocol = TransportProtocol::Tcp;
const UDP: TransportProtocol = TransportProtocol::Udp;

#[test]
fn flows_of_ids_that_an_earlier_agent_shared_continue() {
    let mut fixture = web(LARGE, 1);
    fixture.apply([upsert(service("too", &["10.96.0.2"])), upsert(slice("too", addresses(1)))]);
    fixture.settle();
    // as an earlier agent wrote it: the slots of `too` have the ID of `web`
    let keys = ["10.96.0.1", "10.96.0.2"].map(|ip| frontend(ip, UDP));
    let [shared, own] = keys.map(|key| slot(&fixture, &key, 0));
    let row = fixture.services.get(&keys[1]).unwrap().unwrap();
    fixture.backends.insert(&row.first_slot, &shared).unwrap();
    fixture.generations.insert(&own.id, &(own.generation + 1)).unwrap();

    let rows_before = fixture.services.entries().unwrap();
    fixture.restart();
    fixture.reconciler.pods_loaded();
    fixture.replay();
    fixture.settle();
    let ids = keys.map(|key| slot(&fixture, &key, 0).id);
    assert!(ids[0] != ids[1] && !ids.contains(&shared.id), "new flows: {ids:?}, not {}", shared.id);
    assert_eq!(generation(&fixture, &shared), shared.generation, "old flows continue");
    let service_ids = |rows: Vec<(ServiceKey, Service)>| -> Vec<_> {
        rows.into_iter().map(|(key, row)| (key, row.id)).collect()
    };
    assert_eq!(service_ids(fixture.services.entries().unwrap()), service_ids(rows_before));

    // while one of the services has the backend
    fixture.apply([upsert(slice("web", addresses(2).skip(1)))]);
    fixture.settle();
    assert_eq!(generation(&fixture, &shared), shared.generation);
    fixture.apply([upsert(slice("too", addresses(2).skip(1)))]);
    fixture.settle();
    assert_ne!(generation(&fixture, &shared), shared.generation);
    fixture.restart();
    fixture.reconciler.pods_loaded();
    fixture.replay();
    fixture.settle();
    assert_eq!(fixture.reconciler.changes(), 0, "a second restart writes nothing");
}

#[test]
fn restart_keeps_ids_and_writes_nothing() {
    let mut fixture = web(LARGE, 3);
    let rows = fixture.services.entries().unwrap();
    let writes = fixture.writes();
    fixture.restart();
    fixture.replay();
    fixture.settle();
    assert_eq!(fixture.writes(), writes);
    assert_eq!(fixture.reconciler.changes(), 0);
    fixture.apply([upsert(slice("web", addresses(4)))]);
    fixture.settle();
    for (key, before) in rows.into_iter().filter(|(key, _)| *key != ServiceKey::of_address(key.addr)) {
        let after = fixture.services.get(&key).unwrap().unwrap();
        assert_eq!((after.id, after.generation), (before.id, before.generation + 1));
    }
}

#[test]
fn stale_rows_are_removed_only_after_full_sync() {
    let mut fixture = web(LARGE, 2);
    let frontend = frontend("10.96.0.1", TCP);
    let backend = slot(&fixture, &frontend, 0);
    fixture.store = Store::default();
    fixture.restart();
    fixture.settle();
    assert!(fixture.backends_of(&frontend).is_some(), "nothing is deleted before the first full sync");
    fixture.replay();
    fixture.settle();
    assert!(
        fixture.backends_of(&frontend).is_some(),
        "it may be a host port of a pod that is not loaded yet"
    );
    fixture.reconciler.pods_loaded();
    fixture.settle();
    assert_eq!(fixture.backends_of(&frontend), None);
    assert_ne!(generation(&fixture, &backend), backend.generation);
}

#[test]
fn service_keeps_adopted_backends_until_synced() {
    let mut fixture = web(LARGE, 2);
    fixture.store = Store::default();
    fixture.restart();
    // the Services are listed, the slices are not
    fixture.apply([upsert(service("web", &["10.96.0.1"]))]);
    fixture.settle();
    let frontend = frontend("10.96.0.1", TCP);
    assert_eq!(fixture.backends_of(&frontend).unwrap(), ["10.1.0.1:5300", "10.1.0.2:5300"]);
    assert_eq!(fixture.reconciler.changes(), 0, "nothing was written");

    fixture.apply([SourceEvent::Synced]);
    fixture.settle();
    assert!(fixture.backends_of(&frontend).unwrap().is_empty(), "it has no backends");
}

#[test]
fn backend_removed_during_crash_is_made_stale_by_next_agent() {
    let mut fixture = web(LARGE, 2);
    let frontend = frontend("10.96.0.1", UDP);
    let removed = slot(&fixture, &frontend, 0);
    // two ports: a slot and a frontend each, and no generation
    fixture.faults.fail_after(4);
    fixture.apply([upsert(slice("web", addresses(2).skip(1)))]);
    fixture.work();
    assert_eq!(fixture.backends_of(&frontend).unwrap(), ["10.1.0.2:5300"]);
    assert_eq!(generation(&fixture, &removed), removed.generation);
    fixture.restart();
    fixture.reconciler.pods_loaded();
    fixture.replay();
    fixture.settle();
    assert_ne!(generation(&fixture, &removed), removed.generation);
}
