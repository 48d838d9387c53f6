//! Conflicts: single cases and random sequences.

use proptest::prelude::*;

use super::*;
use crate::state::{NamespacedName, Node, Service, Store};

fn key(name: &str) -> ObjectKey {
    ObjectKey::Service(NamespacedName::new("default", name))
}

fn service(name: &str, ips: &[&str]) -> SourceEvent {
    SourceEvent::Upsert(Object::Service(Service {
        name: NamespacedName::new("default", name),
        owner: Owner::default(),
        cluster_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: Vec::new(),
        affinity_timeout: None,
        load_balancing: None,
        forwarding: None,
        ..Service::default()
    }))
}

fn node(name: &str, cidrs: &[&str]) -> SourceEvent {
    SourceEvent::Upsert(Object::Node(Node {
        name: name.to_owned(),
        owner: Owner::default(),
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        ..Node::default()
    }))
}

fn removed_service(name: &str) -> SourceEvent {
    SourceEvent::Remove(key(name), Owner::default())
}

fn reasons(conflicts: &ConflictResolver) -> Vec<String> {
    conflicts.waiting_reasons().map(|(key, reason)| format!("{key}: {reason}")).collect()
}

#[test]
fn second_service_with_cluster_ip_waits_until_first_is_deleted() {
    let mut conflicts = ConflictResolver::default();
    assert_eq!(conflicts.apply([service("b", &["10.0.0.1"])]), [service("b", &["10.0.0.1"])]);
    assert_eq!(conflicts.apply([service("a", &["fd00::1", "10.0.0.1"])]), []);
    let reason = "Service default/a: cluster IP 10.0.0.1 is already used by Service default/b: not applied until Service default/b releases it";
    assert_eq!(reasons(&conflicts), [reason]);
    assert_eq!(
        conflicts.apply([removed_service("b")]),
        [removed_service("b"), service("a", &["fd00::1", "10.0.0.1"])]
    );
    assert_eq!(reasons(&conflicts), [""; 0]);
}

#[test]
fn waiting_service_is_delivered_when_owner_changes_its_cluster_ip() {
    let mut conflicts = ConflictResolver::default();
    conflicts.apply([service("a", &["10.0.0.1"]), service("b", &["10.0.0.1"])]);
    let moved = service("a", &["10.0.0.2"]);
    assert_eq!(conflicts.apply([moved.clone()]), [moved, service("b", &["10.0.0.1"])]);
}

#[test]
fn conflicting_update_keeps_previous_version() {
    let mut conflicts = ConflictResolver::default();
    conflicts.apply([service("a", &["10.0.0.1"]), service("b", &["10.0.0.2"])]);
    assert_eq!(conflicts.apply([service("b", &["10.0.0.1"])]), []);
    assert!(reasons(&conflicts)[0].ends_with("; its previous version stays applied"));
    // the resources of the previous version are not free
    assert_eq!(conflicts.apply([service("c", &["10.0.0.2"])]), []);
    // reverting frees nothing
    assert_eq!(conflicts.apply([service("b", &["10.0.0.2"])]), [service("b", &["10.0.0.2"])]);
    assert_eq!(conflicts.apply([removed_service("b")]), [removed_service("b"), service("c", &["10.0.0.2"])]);
}

#[test]
fn waiting_service_can_be_deleted_without_event() {
    let mut conflicts = ConflictResolver::default();
    conflicts.apply([service("a", &["10.0.0.1"]), service("b", &["10.0.0.1"])]);
    assert_eq!(conflicts.apply([removed_service("b")]), []);
    assert_eq!(conflicts.apply([removed_service("a")]), [removed_service("a")]);
}

#[test]
fn removal_names_delivered_incarnation() {
    let owned = |event: SourceEvent, uid: &str| match event {
        SourceEvent::Upsert(Object::Service(service)) => {
            SourceEvent::Upsert(Object::Service(Service { owner: Owner { uid: uid.into() }, ..service }))
        }
        other => other,
    };
    let mut conflicts = ConflictResolver::default();
    conflicts.apply([service("a", &["10.0.0.1"]), owned(service("b", &["10.0.0.2"]), "first")]);
    conflicts.apply([owned(service("b", &["10.0.0.1"]), "second")]);
    let owner = |uid: &str| Owner { uid: uid.into() };
    let removed = conflicts.apply([SourceEvent::Remove(key("b"), owner("second"))]);
    assert_eq!(removed, [SourceEvent::Remove(key("b"), owner("first"))]);
}

#[test]
fn services_that_swap_cluster_ips_are_both_delivered() {
    let mut conflicts = ConflictResolver::default();
    conflicts.apply([service("a", &["10.0.0.1"]), service("b", &["10.0.0.2"])]);
    let out = conflicts.apply([service("a", &["10.0.0.2"]), service("b", &["10.0.0.1"])]);
    assert_eq!(out, [removed_service("b"), service("a", &["10.0.0.2"]), service("b", &["10.0.0.1"])]);
}

#[test]
fn overlapping_pod_cidrs_are_detected_in_both_directions() {
    let mut conflicts = ConflictResolver::default();
    conflicts.apply([node("a", &["10.1.0.0/16", "fd00:1::/64"])]);
    let others =
        [node("b", &["10.0.0.0/8"]), node("c", &["10.1.255.0/24"]), node("d", &["10.2.0.0/24", "fd00::/16"])];
    assert_eq!(conflicts.apply(others), []);
    assert_eq!(reasons(&conflicts).len(), 3);
    assert!(reasons(&conflicts)[1].contains("part of pod CIDR 10.1.255.0/24 is already used by Node a"));
    assert_eq!(conflicts.apply([node("e", &["10.2.0.0/16", "fd00:2::/64"])]).len(), 1);
}

#[derive(Clone, Debug)]
enum Edit {
    Service(u8, Vec<u8>),
    Node(u8, u8, u8),
    RemoveService(u8),
    RemoveNode(u8),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        3 => (0_u8..5, prop::collection::btree_set(0_u8..5, 1..3))
            .prop_map(|(name, ips)| Edit::Service(name, ips.into_iter().collect())),
        2 => (0_u8..4, 8_u8..12, any::<u8>()).prop_map(|(name, len, net)| Edit::Node(name, len, net)),
        1 => (0_u8..5).prop_map(Edit::RemoveService),
        1 => (0_u8..4).prop_map(Edit::RemoveNode),
    ]
}

fn event(edit: &Edit) -> SourceEvent {
    match edit {
        Edit::Service(name, ips) => {
            let ips: Vec<_> = ips.iter().map(|ip| format!("10.0.0.{ip}")).collect();
            service(&format!("s{name}"), &ips.iter().map(String::as_str).collect::<Vec<_>>())
        }
        Edit::Node(name, len, net) => {
            let cidr = IpNet::new(IpAddr::from([10, *net, 0, 0]), *len).unwrap().trunc().to_string();
            node(&format!("n{name}"), &[&cidr])
        }
        Edit::RemoveService(name) => removed_service(&format!("s{name}")),
        Edit::RemoveNode(name) => SourceEvent::Remove(ObjectKey::Node(format!("n{name}")), Owner::default()),
    }
}

fn collisions(store: &Store) -> usize {
    let objects: Vec<Vec<Resource>> = store
        .services()
        .map(|service| resources(&Object::Service(service.clone())))
        .chain(store.nodes().map(|node| resources(&Object::Node(node.clone()))))
        .collect();
    let pairs =
        objects.iter().enumerate().flat_map(|(n, one)| objects[n + 1..].iter().map(move |two| (one, two)));
    pairs.filter(|(one, two)| one.iter().any(|a| two.iter().any(|b| a.excludes(*b)))).count()
}

proptest! {
    #[test]
    fn delivered_objects_never_conflict_and_every_waiting_object_has_an_owner(
        batches in prop::collection::vec(prop::collection::vec(edit(), 1..6), 1..12)
    ) {
        let mut conflicts = ConflictResolver::default();
        let mut store = Store::default();
        let mut latest = BTreeMap::new();
        for batch in batches {
            for edit in &batch {
                match event(edit) {
                    SourceEvent::Upsert(object) => { latest.insert(object.key(), object); }
                    SourceEvent::Remove(key, _) => { latest.remove(&key); }
                    SourceEvent::Synced => {}
                }
            }
            for event in conflicts.apply(batch.iter().map(event)) {
                store.apply(event);
                prop_assert_eq!(collisions(&store), 0);
            }
            let waiting_reasons: BTreeSet<_> = conflicts.waiting_reasons().map(|(key, _)| key.clone()).collect();
            // a waiting object has a reason, and every other object is as last written
            prop_assert_eq!(waiting_reasons.len(), conflicts.waiting.len());
            for (key, object) in &latest {
                let there = match key {
                    ObjectKey::Node(name) => store.node(name).cloned().map(Object::Node),
                    ObjectKey::Service(name) => store.service(name).cloned().map(Object::Service),
                    _ => None,
                };
                prop_assert!(waiting_reasons.contains(key) || there.as_ref() == Some(object), "{}", key);
            }
            for key in store.services().map(|it| Object::Service(it.clone()).key()) {
                prop_assert!(latest.contains_key(&key));
            }
        }
        // once all owners are deleted, the remaining object is delivered
        for key in latest.keys().skip(1).cloned().collect::<Vec<_>>() {
            for event in conflicts.apply([SourceEvent::Remove(key, Owner::default())]) {
                store.apply(event);
            }
        }
        prop_assert_eq!(conflicts.waiting.len(), 0);
        prop_assert_eq!(store.services().count() + store.nodes().count(), latest.len().min(1));
    }
}
