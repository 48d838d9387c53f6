//! Rows and slots that were modified by another program are rewritten.

use super::{
    services::{addresses, web},
    *,
};

const TCP: TransportProtocol = TransportProtocol::Tcp;

/// A restarted fixture whose tables were modified by `damage`.
fn damaged(damage: impl FnOnce(&mut Fixture)) -> Fixture {
    let mut fixture = web(LARGE, 3);
    fixture.apply([upsert(service("good", &["10.96.0.2"])), upsert(slice("good", addresses(2)))]);
    fixture.settle();
    damage(&mut fixture);
    let broken = frontend("10.96.0.1", TCP);
    fixture.checker.lock().unwrap().broken.insert(broken);
    fixture.restart();
    fixture
}

fn assert_repaired(mut fixture: Fixture, writes: u64) {
    let good = frontend("10.96.0.2", TCP);
    let untouched = fixture.services.get(&good).unwrap();
    fixture.replay();
    fixture.settle();
    let backends_of = fixture.backends_of(&frontend("10.96.0.1", TCP)).unwrap();
    assert_eq!(backends_of, ["10.1.0.1:5300", "10.1.0.2:5300", "10.1.0.3:5300"]);
    assert_eq!(fixture.services.get(&good).unwrap(), untouched, "other rows are unchanged");
    assert_eq!(fixture.reconciler.changes(), writes);
}

fn change_row(fixture: &mut Fixture, change: impl FnOnce(&mut Service, &Service)) {
    let (broken, good) = (frontend("10.96.0.1", TCP), frontend("10.96.0.2", TCP));
    let mut row = fixture.services.get(&broken).unwrap().unwrap();
    let good = fixture.services.get(&good).unwrap().unwrap();
    change(&mut row, &good);
    fixture.services.insert(&broken, &row.with_checksum(&broken)).unwrap();
}

/// A range of three slots, a row, and the IDs of three backends.
const REPAIR: u64 = 3 + 1 + 3;

#[test]
fn overlapping_row_is_rewritten() {
    let fixture = damaged(|fixture| {
        change_row(fixture, |row, good| {
            row.first_slot = good.first_slot + 1;
            row.count = 3;
        });
    });
    assert_repaired(fixture, REPAIR);
}

#[test]
fn row_beyond_table_is_rewritten() {
    let fixture = damaged(|fixture| {
        change_row(fixture, |row, _| (row.first_slot, row.count) = (LARGE.slots - 1, u32::MAX));
    });
    assert_repaired(fixture, REPAIR);
}

#[test]
fn row_over_whole_table_is_rewritten() {
    // the IDs are freed and allocated again while the range is in quarantine
    let fixture = damaged(|fixture| {
        change_row(fixture, |row, _| (row.first_slot, row.count) = (0, LARGE.slots));
    });
    assert_repaired(fixture, REPAIR + 2 * 3);
}

#[test]
fn row_with_wrong_checksum_is_rewritten() {
    let fixture = damaged(|fixture| {
        let broken = frontend("10.96.0.1", TCP);
        let mut row = fixture.services.get(&broken).unwrap().unwrap();
        row.checksum ^= 1;
        fixture.services.insert(&broken, &row).unwrap();
    });
    assert_repaired(fixture, 3 + 1);
}

#[test]
fn modified_slot_is_rewritten() {
    let fixture = damaged(|fixture| {
        let row = fixture.services.get(&frontend("10.96.0.1", TCP)).unwrap().unwrap();
        let mut slot = fixture.backends.get(&row.first_slot).unwrap().unwrap();
        slot.generation += 2;
        fixture.backends.insert(&row.first_slot, &slot).unwrap();
    });
    assert_repaired(fixture, REPAIR);
}

#[test]
fn audit_repairs_foreign_changes() {
    let mut fixture = web(LARGE, 2);
    let key = frontend("10.96.0.1", TCP);
    let row = fixture.services.get(&key).unwrap().unwrap();
    let backends_of = fixture.backends_of(&key);
    let audit = |fixture: &mut Fixture| {
        fixture.advance(Duration::from_secs(60));
        while !fixture.reconciler.audit().unwrap() {}
        fixture.settle();
    };
    audit(&mut fixture);
    assert_eq!(fixture.reconciler.statistics().drift, 0);

    fixture.services.remove(&key).unwrap();
    audit(&mut fixture);
    assert_eq!((fixture.backends_of(&key), fixture.reconciler.statistics().drift), (backends_of.clone(), 1));

    let row = fixture.services.get(&key).unwrap().unwrap_or(row);
    fixture.backends.remove(&row.first_slot).unwrap();
    audit(&mut fixture);
    assert_eq!((fixture.backends_of(&key), fixture.reconciler.statistics().drift), (backends_of, 2));
}
