//! Applying events to the store, and the changes it reports.

use proptest::prelude::*;

use super::*;

fn name(n: u8) -> NamespacedName {
    NamespacedName::new("default", format!("o{n}"))
}

fn owner(uid: u8) -> Owner {
    Owner { uid: uid.to_string().as_str().into() }
}

fn slice(n: u8, service: u8, uid: u8) -> SourceEvent {
    SourceEvent::Upsert(Object::EndpointSlice(EndpointSlice {
        name: name(n),
        owner: owner(uid),
        service: name(service),
        ..EndpointSlice::default()
    }))
}

fn node(n: u8, uid: u8) -> SourceEvent {
    SourceEvent::Upsert(Object::Node(Node { name: format!("n{n}"), owner: owner(uid), ..Node::default() }))
}

fn pod(n: u8, uid: u8) -> SourceEvent {
    SourceEvent::Upsert(Object::Pod(Pod { name: name(n), owner: owner(uid), ..Pod::default() }))
}

#[test]
fn equal_object_is_no_change() {
    let mut store = Store::default();
    assert!(!store.apply(node(1, 1)).is_empty());
    let revision = store.revision();
    assert!(store.apply(node(1, 1)).is_empty());
    assert_eq!(store.revision(), revision);
}

#[test]
fn slice_moved_to_another_service_changes_both_services() {
    let mut store = Store::default();
    store.apply(slice(1, 1, 1));
    assert_eq!(store.apply(slice(1, 2, 1)).services, BTreeSet::from([name(1), name(2)]));
    assert_eq!((store.slices_of(&name(1)).count(), store.slices_of(&name(2)).count()), (0, 1));
}

#[test]
fn removal_of_earlier_incarnation_is_ignored() {
    let mut store = Store::default();
    store.apply(node(1, 2));
    assert!(store.apply(SourceEvent::Remove(ObjectKey::Node("n1".to_owned()), owner(1))).is_empty());
    assert!(store.node("n1").is_some());
    assert!(!store.apply(SourceEvent::Remove(ObjectKey::Node("n1".to_owned()), owner(2))).is_empty());
    assert!(store.node("n1").is_none());
}

#[test]
fn namespaces_and_pods_are_added_and_removed() {
    let mut store = Store::default();
    let shop = Namespace { name: "shop".to_owned(), owner: owner(1), ..Namespace::default() };
    let changes = store.apply(SourceEvent::Upsert(Object::Namespace(shop.clone())));
    assert_eq!(changes.namespaces, BTreeSet::from(["shop".to_owned()]));
    assert_eq!(store.apply(pod(1, 1)).pods, BTreeSet::from([name(1)]));
    assert_eq!((store.namespace("shop"), store.pods().count()), (Some(&shop), 1));
    assert_eq!(store.everything().pods.len() + store.everything().namespaces.len(), 2);
    // a StatefulSet recreates a pod under the same name before the old pod's deletion arrives
    store.apply(pod(1, 2));
    assert!(store.apply(SourceEvent::Remove(ObjectKey::Pod(name(1)), owner(1))).is_empty());
    assert!(!store.apply(SourceEvent::Remove(ObjectKey::Pod(name(1)), owner(2))).is_empty());
    assert!(!store.apply(SourceEvent::Remove(ObjectKey::Namespace("shop".to_owned()), owner(1))).is_empty());
    assert_eq!((store.namespaces().count(), store.pod(&name(1))), (0, None));
}

#[test]
fn synced_changes_state_once() {
    let mut store = Store::default();
    assert!(store.apply(SourceEvent::Synced).synced);
    assert!(store.apply(SourceEvent::Synced).is_empty());
}

fn event() -> impl Strategy<Value = SourceEvent> {
    let small = 0_u8..4;
    prop_oneof![
        (small.clone(), small.clone()).prop_map(|(n, uid)| node(n, uid)),
        (small.clone(), small.clone(), small.clone()).prop_map(|(n, service, uid)| slice(n, service, uid)),
        (small.clone(), small.clone())
            .prop_map(|(n, uid)| SourceEvent::Remove(ObjectKey::Node(format!("n{n}")), owner(uid))),
        (small.clone(), small)
            .prop_map(|(n, uid)| SourceEvent::Remove(ObjectKey::EndpointSlice(name(n)), owner(uid))),
    ]
}

proptest! {
    /// The slice index matches the slices, and `Changes` names everything that changed.
    #[test]
    fn changes_name_every_difference(events in proptest::collection::vec(event(), 0..60)) {
        let mut store = Store::default();
        for event in events {
            let before = store.clone();
            let changes = store.apply(event);
            for n in 0..4 {
                let service = name(n);
                let same = before.slices_of(&service).eq(store.slices_of(&service));
                prop_assert_eq!(!same, changes.services.contains(&name(n)));
                let node = format!("n{n}");
                prop_assert_eq!(before.node(&node) != store.node(&node), changes.nodes.contains(&node));
                prop_assert!(store.slices_of(&name(n)).all(|slice| slice.service == name(n)));
            }
            let listed: usize = (0..4).map(|n| store.slices_of(&name(n)).count()).sum();
            prop_assert_eq!(listed, store.slices.len());
            prop_assert_eq!(store.revision() > before.revision(), !changes.is_empty());
        }
    }
}
