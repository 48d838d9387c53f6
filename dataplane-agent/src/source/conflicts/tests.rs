//! Collisions, one by one and at random.

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

fn gone(name: &str) -> SourceEvent {
    SourceEvent::Remove(key(name), Owner::default())
}

fn reasons(conflicts: &Conflicts) -> Vec<String> {
    conflicts.refused().map(|(key, reason)| format!("{key}: {reason}")).collect()
}

#[test]
fn the_second_of_one_address_waits_until_the_first_goes() {
    let mut conflicts = Conflicts::default();
    assert_eq!(conflicts.apply([service("b", &["10.0.0.1"])]), [service("b", &["10.0.0.1"])]);
    assert_eq!(conflicts.apply([service("a", &["fd00::1", "10.0.0.1"])]), []);
    let reason =
        "Service default/a: cluster IP 10.0.0.1 is held by Service default/b: refused until that goes";
    assert_eq!(reasons(&conflicts), [reason]);
    assert_eq!(conflicts.apply([gone("b")]), [gone("b"), service("a", &["fd00::1", "10.0.0.1"])]);
    assert_eq!(reasons(&conflicts), [""; 0]);
}

#[test]
fn the_second_is_delivered_when_the_first_moves() {
    let mut conflicts = Conflicts::default();
    conflicts.apply([service("a", &["10.0.0.1"]), service("b", &["10.0.0.1"])]);
    let moved = service("a", &["10.0.0.2"]);
    assert_eq!(conflicts.apply([moved.clone()]), [moved, service("b", &["10.0.0.1"])]);
}

#[test]
fn a_change_into_a_conflict_keeps_the_earlier_state() {
    let mut conflicts = Conflicts::default();
    conflicts.apply([service("a", &["10.0.0.1"]), service("b", &["10.0.0.2"])]);
    assert_eq!(conflicts.apply([service("b", &["10.0.0.1"])]), []);
    assert!(reasons(&conflicts)[0].ends_with("; its earlier state stays"));
    // what the earlier state has is not free
    assert_eq!(conflicts.apply([service("c", &["10.0.0.2"])]), []);
    // changing back is no change of what was delivered, but frees nobody
    assert_eq!(conflicts.apply([service("b", &["10.0.0.2"])]), [service("b", &["10.0.0.2"])]);
    assert_eq!(conflicts.apply([gone("b")]), [gone("b"), service("c", &["10.0.0.2"])]);
}

#[test]
fn one_that_waits_can_go_without_a_trace() {
    let mut conflicts = Conflicts::default();
    conflicts.apply([service("a", &["10.0.0.1"]), service("b", &["10.0.0.1"])]);
    assert_eq!(conflicts.apply([gone("b")]), []);
    assert_eq!(conflicts.apply([gone("a")]), [gone("a")]);
}

#[test]
fn the_incarnation_that_was_delivered_is_the_one_removed() {
    let owned = |event: SourceEvent, uid: &str| match event {
        SourceEvent::Upsert(Object::Service(service)) => {
            SourceEvent::Upsert(Object::Service(Service { owner: Owner { uid: uid.into() }, ..service }))
        }
        other => other,
    };
    let mut conflicts = Conflicts::default();
    conflicts.apply([service("a", &["10.0.0.1"]), owned(service("b", &["10.0.0.2"]), "first")]);
    conflicts.apply([owned(service("b", &["10.0.0.1"]), "second")]);
    let owner = |uid: &str| Owner { uid: uid.into() };
    let removed = conflicts.apply([SourceEvent::Remove(key("b"), owner("second"))]);
    assert_eq!(removed, [SourceEvent::Remove(key("b"), owner("first"))]);
}

#[test]
fn services_that_swap_their_addresses_are_both_delivered() {
    let mut conflicts = Conflicts::default();
    conflicts.apply([service("a", &["10.0.0.1"]), service("b", &["10.0.0.2"])]);
    let out = conflicts.apply([service("a", &["10.0.0.2"]), service("b", &["10.0.0.1"])]);
    assert_eq!(out, [gone("b"), service("a", &["10.0.0.2"]), service("b", &["10.0.0.1"])]);
}

#[test]
fn overlapping_ranges_are_found_on_either_side() {
    let mut conflicts = Conflicts::default();
    conflicts.apply([node("a", &["10.1.0.0/16", "fd00:1::/64"])]);
    let others =
        [node("b", &["10.0.0.0/8"]), node("c", &["10.1.255.0/24"]), node("d", &["10.2.0.0/24", "fd00::/16"])];
    assert_eq!(conflicts.apply(others), []);
    assert_eq!(reasons(&conflicts).len(), 3);
    assert!(reasons(&conflicts)[1].contains("some of pod CIDR 10.1.255.0/24 is held by Node a"));
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
        Edit::RemoveService(name) => gone(&format!("s{name}")),
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
    fn what_is_delivered_never_collides_and_nobody_waits_without_a_holder(
        batches in prop::collection::vec(prop::collection::vec(edit(), 1..6), 1..12)
    ) {
        let mut conflicts = Conflicts::default();
        let mut store = Store::default();
        let mut wanted = BTreeMap::new();
        for batch in batches {
            for edit in &batch {
                match event(edit) {
                    SourceEvent::Upsert(object) => { wanted.insert(object.key(), object); }
                    SourceEvent::Remove(key, _) => { wanted.remove(&key); }
                    SourceEvent::Synced => {}
                }
            }
            for event in conflicts.apply(batch.iter().map(event)) {
                store.apply(event);
                prop_assert_eq!(collisions(&store), 0);
            }
            let refused: BTreeSet<_> = conflicts.refused().map(|(key, _)| key.clone()).collect();
            // who waits is refused by somebody, and everybody else is as last wanted
            prop_assert_eq!(refused.len(), conflicts.waiting.len());
            for (key, object) in &wanted {
                let there = match key {
                    ObjectKey::Node(name) => store.node(name).cloned().map(Object::Node),
                    ObjectKey::Service(name) => store.service(name).cloned().map(Object::Service),
                    _ => None,
                };
                prop_assert!(refused.contains(key) || there.as_ref() == Some(object), "{}", key);
            }
            for key in store.services().map(|it| Object::Service(it.clone()).key()) {
                prop_assert!(wanted.contains_key(&key));
            }
        }
        // when all holders are gone, whoever is left is delivered
        for key in wanted.keys().skip(1).cloned().collect::<Vec<_>>() {
            for event in conflicts.apply([SourceEvent::Remove(key, Owner::default())]) {
                store.apply(event);
            }
        }
        prop_assert_eq!(conflicts.waiting.len(), 0);
        prop_assert_eq!(store.services().count() + store.nodes().count(), wanted.len().min(1));
    }
}
