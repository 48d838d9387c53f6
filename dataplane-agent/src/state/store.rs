//! The objects of the cluster as last heard, and which of them an event changed.
//!
//! One writer calls [`Store::apply`]; everybody who compiles reads. Nothing here judges an object: a source delivers
//! only what it has validated.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use super::{
    EndpointSlice, Namespace, NamespacedName, Node, Object, ObjectKey, Owner, Pod, Service, ServiceCidr,
    SourceEvent,
};

/// Objects by name. Boxed, for a list that came in order leaves a tree half empty.
type Objects<K, V> = BTreeMap<K, Box<V>>;

/// Everything the agent knows of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Store {
    nodes: Objects<String, Node>,
    namespaces: Objects<String, Namespace>,
    services: Objects<NamespacedName, Service>,
    slices: Objects<NamespacedName, EndpointSlice>,
    pods: Objects<NamespacedName, Pod>,
    service_cidrs: Objects<String, ServiceCidr>,
    /// Service → its slices, sorted. A service with a thousand slices costs nothing to those with one.
    slices_of: BTreeMap<NamespacedName, Vec<NamespacedName>>,
    synced: bool,
    revision: u64,
}

/// What has to be compiled again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub nodes: BTreeSet<String>,
    /// Services that changed, came or went, or one of whose slices did.
    pub services: BTreeSet<NamespacedName>,
    pub namespaces: BTreeSet<String>,
    pub pods: BTreeSet<NamespacedName>,
    pub service_cidrs: BTreeSet<String>,
    /// From now on, what is not in the store does not exist.
    pub synced: bool,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes up later changes, to compile once for both.
    pub fn merge(&mut self, later: Self) {
        self.nodes.extend(later.nodes);
        self.services.extend(later.services);
        self.namespaces.extend(later.namespaces);
        self.pods.extend(later.pods);
        self.service_cidrs.extend(later.service_cidrs);
        self.synced |= later.synced;
    }
}

impl Store {
    /// Takes up what a source says. An object that is as it was is no change.
    pub fn apply(&mut self, event: SourceEvent) -> Changes {
        let mut changes = Changes::default();
        match event {
            SourceEvent::Upsert(Object::Node(node)) => {
                let name = node.name.clone();
                if upsert(&mut self.nodes, name.clone(), node) != Upserted::Same {
                    changes.nodes.insert(name);
                }
            }
            SourceEvent::Upsert(Object::Service(service)) => {
                let name = service.name.clone();
                if upsert(&mut self.services, name.clone(), service) != Upserted::Same {
                    changes.services.insert(name);
                }
            }
            SourceEvent::Upsert(Object::Namespace(namespace)) => {
                let name = namespace.name.clone();
                if upsert(&mut self.namespaces, name.clone(), namespace) != Upserted::Same {
                    changes.namespaces.insert(name);
                }
            }
            SourceEvent::Upsert(Object::Pod(pod)) => {
                let name = pod.name.clone();
                if upsert(&mut self.pods, name.clone(), pod) != Upserted::Same {
                    changes.pods.insert(name);
                }
            }
            SourceEvent::Upsert(Object::ServiceCidr(range)) => {
                let name = range.name.clone();
                if upsert(&mut self.service_cidrs, name.clone(), range) != Upserted::Same {
                    changes.service_cidrs.insert(name);
                }
            }
            SourceEvent::Upsert(Object::EndpointSlice(slice)) => self.upsert_slice(slice, &mut changes),
            SourceEvent::Remove(key, owner) => self.remove(&key, owner, &mut changes),
            SourceEvent::Synced => changes.synced = !std::mem::replace(&mut self.synced, true),
        }
        if !changes.is_empty() {
            self.revision += 1;
        }
        changes
    }

    fn upsert_slice(&mut self, slice: EndpointSlice, changes: &mut Changes) {
        let (name, service) = (slice.name.clone(), slice.service.clone());
        match upsert(&mut self.slices, name.clone(), slice) {
            Upserted::Same => return,
            Upserted::Changed(before) if before.service != service => {
                self.unlink(&name, &before.service);
                changes.services.insert(before.service);
            }
            Upserted::New | Upserted::Changed(_) => {}
        }
        // most services have one
        let slices = self.slices_of.entry(service.clone()).or_insert_with(|| Vec::with_capacity(1));
        if let Err(place) = slices.binary_search(&name) {
            slices.insert(place, name);
        }
        changes.services.insert(service);
    }

    fn remove(&mut self, key: &ObjectKey, owner: Owner, changes: &mut Changes) {
        match key {
            ObjectKey::Node(name) => {
                if remove(&mut self.nodes, name, owner, |node| &node.owner).is_some() {
                    changes.nodes.insert(name.clone());
                }
            }
            ObjectKey::Service(name) => {
                if remove(&mut self.services, name, owner, |service| &service.owner).is_some() {
                    changes.services.insert(name.clone());
                }
            }
            ObjectKey::Namespace(name) => {
                if remove(&mut self.namespaces, name, owner, |namespace| &namespace.owner).is_some() {
                    changes.namespaces.insert(name.clone());
                }
            }
            ObjectKey::Pod(name) => {
                if remove(&mut self.pods, name, owner, |pod| &pod.owner).is_some() {
                    changes.pods.insert(name.clone());
                }
            }
            ObjectKey::ServiceCidr(name) => {
                if remove(&mut self.service_cidrs, name, owner, |range| &range.owner).is_some() {
                    changes.service_cidrs.insert(name.clone());
                }
            }
            ObjectKey::EndpointSlice(name) => {
                if let Some(slice) = remove(&mut self.slices, name, owner, |slice| &slice.owner) {
                    self.unlink(name, &slice.service);
                    changes.services.insert(slice.service);
                }
            }
        }
    }

    fn unlink(&mut self, slice: &NamespacedName, service: &NamespacedName) {
        if let Some(slices) = self.slices_of.get_mut(service) {
            slices.retain(|other| other != slice);
            if slices.is_empty() {
                self.slices_of.remove(service);
            }
        }
    }

    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).map(Box::as_ref)
    }

    /// By name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> + Clone {
        self.nodes.values().map(Box::as_ref)
    }

    pub fn service(&self, name: &NamespacedName) -> Option<&Service> {
        self.services.get(name).map(Box::as_ref)
    }

    /// By namespace and name.
    pub fn services(&self) -> impl Iterator<Item = &Service> + Clone {
        self.services.values().map(Box::as_ref)
    }

    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(name).map(Box::as_ref)
    }

    /// By name.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> + Clone {
        self.namespaces.values().map(Box::as_ref)
    }

    /// A pod of this node.
    pub fn pod(&self, name: &NamespacedName) -> Option<&Pod> {
        self.pods.get(name).map(Box::as_ref)
    }

    /// The pods of this node, by namespace and name.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> + Clone {
        self.pods.values().map(Box::as_ref)
    }

    /// A range of cluster IPs.
    pub fn service_cidr(&self, name: &str) -> Option<&ServiceCidr> {
        self.service_cidrs.get(name).map(Box::as_ref)
    }

    /// How many slices there are.
    pub fn slice_count(&self) -> usize {
        self.slices.len()
    }

    /// Everything there is, as a change: for whoever comes late.
    pub fn everything(&self) -> Changes {
        Changes {
            nodes: self.nodes.keys().cloned().collect(),
            services: self.services.keys().cloned().collect(),
            namespaces: self.namespaces.keys().cloned().collect(),
            pods: self.pods.keys().cloned().collect(),
            service_cidrs: self.service_cidrs.keys().cloned().collect(),
            synced: self.synced,
        }
    }

    /// The slices that name the service, whether or not it exists.
    pub fn slices_of(&self, service: &NamespacedName) -> impl Iterator<Item = &EndpointSlice> + Clone {
        self.slices_of
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|name| self.slices.get(name).map(Box::as_ref))
    }

    /// Whether the sources have delivered everything once.
    pub const fn is_synced(&self) -> bool {
        self.synced
    }

    /// Rises with every change.
    pub const fn revision(&self) -> u64 {
        self.revision
    }
}

/// What an upsert did.
#[derive(PartialEq)]
enum Upserted<V> {
    New,
    /// From this value.
    Changed(V),
    Same,
}

fn upsert<K: Ord, V: PartialEq>(map: &mut Objects<K, V>, key: K, value: V) -> Upserted<V> {
    match map.entry(key) {
        Entry::Occupied(entry) if **entry.get() == value => Upserted::Same,
        Entry::Occupied(mut entry) => Upserted::Changed(std::mem::replace(&mut **entry.get_mut(), value)),
        Entry::Vacant(entry) => {
            entry.insert(Box::new(value));
            Upserted::New
        }
    }
}

/// A late goodbye of an earlier incarnation (another UID) does not remove its successor.
fn remove<K: Ord, V>(
    map: &mut Objects<K, V>,
    key: &K,
    owner: Owner,
    owner_of: impl Fn(&V) -> &Owner,
) -> Option<V> {
    let held = owner_of(map.get(key)?);
    if owner.uid.excludes(held.uid) {
        return None;
    }
    map.remove(key).map(|held| *held)
}

#[cfg(test)]
mod tests {
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
        SourceEvent::Upsert(Object::Node(Node {
            name: format!("n{n}"),
            owner: owner(uid),
            ..Node::default()
        }))
    }

    fn pod(n: u8, uid: u8) -> SourceEvent {
        SourceEvent::Upsert(Object::Pod(Pod { name: name(n), owner: owner(uid), ..Pod::default() }))
    }

    #[test]
    fn the_same_again_is_no_change() {
        let mut store = Store::default();
        assert!(!store.apply(node(1, 1)).is_empty());
        let revision = store.revision();
        assert!(store.apply(node(1, 1)).is_empty());
        assert_eq!(store.revision(), revision);
    }

    #[test]
    fn a_slice_that_changes_its_service_changes_both() {
        let mut store = Store::default();
        store.apply(slice(1, 1, 1));
        assert_eq!(store.apply(slice(1, 2, 1)).services, BTreeSet::from([name(1), name(2)]));
        assert_eq!((store.slices_of(&name(1)).count(), store.slices_of(&name(2)).count()), (0, 1));
    }

    #[test]
    fn a_goodbye_of_an_earlier_incarnation_is_not_believed() {
        let mut store = Store::default();
        store.apply(node(1, 2));
        assert!(store.apply(SourceEvent::Remove(ObjectKey::Node("n1".to_owned()), owner(1))).is_empty());
        assert!(store.node("n1").is_some());
        assert!(!store.apply(SourceEvent::Remove(ObjectKey::Node("n1".to_owned()), owner(2))).is_empty());
        assert!(store.node("n1").is_none());
    }

    #[test]
    fn namespaces_and_pods_come_and_go() {
        let mut store = Store::default();
        let shop = Namespace { name: "shop".to_owned(), owner: owner(1), ..Namespace::default() };
        let changes = store.apply(SourceEvent::Upsert(Object::Namespace(shop.clone())));
        assert_eq!(changes.namespaces, BTreeSet::from(["shop".to_owned()]));
        assert_eq!(store.apply(pod(1, 1)).pods, BTreeSet::from([name(1)]));
        assert_eq!((store.namespace("shop"), store.pods().count()), (Some(&shop), 1));
        assert_eq!(store.everything().pods.len() + store.everything().namespaces.len(), 2);
        // a pod of a StatefulSet comes back by the same name before its predecessor's end is heard of
        store.apply(pod(1, 2));
        assert!(store.apply(SourceEvent::Remove(ObjectKey::Pod(name(1)), owner(1))).is_empty());
        assert!(!store.apply(SourceEvent::Remove(ObjectKey::Pod(name(1)), owner(2))).is_empty());
        assert!(
            !store.apply(SourceEvent::Remove(ObjectKey::Namespace("shop".to_owned()), owner(1))).is_empty()
        );
        assert_eq!((store.namespaces().count(), store.pod(&name(1))), (0, None));
    }

    #[test]
    fn synced_is_said_once() {
        let mut store = Store::default();
        assert!(store.apply(SourceEvent::Synced).synced);
        assert!(store.apply(SourceEvent::Synced).is_empty());
    }

    fn event() -> impl Strategy<Value = SourceEvent> {
        let small = 0_u8..4;
        prop_oneof![
            (small.clone(), small.clone()).prop_map(|(n, uid)| node(n, uid)),
            (small.clone(), small.clone(), small.clone())
                .prop_map(|(n, service, uid)| slice(n, service, uid)),
            (small.clone(), small.clone())
                .prop_map(|(n, uid)| SourceEvent::Remove(ObjectKey::Node(format!("n{n}")), owner(uid))),
            (small.clone(), small)
                .prop_map(|(n, uid)| SourceEvent::Remove(ObjectKey::EndpointSlice(name(n)), owner(uid))),
        ]
    }

    proptest! {
        /// The index of slices says what the slices say, and everything that changed is named.
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
}
