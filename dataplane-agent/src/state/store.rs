//! The latest objects of the cluster, and which of them an event changed.
//!
//! One writer calls [`Store::apply`]; compilers read. Objects are not validated here: a source
//! delivers only valid ones.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use super::{
    EndpointSlice, Namespace, NamespacedName, Node, Object, ObjectKey, Owner, Pod, Service, ServiceCidr,
    SourceEvent,
};

/// Objects by name. Boxed, because a tree filled in key order leaves its nodes half empty.
type Objects<K, V> = BTreeMap<K, Box<V>>;

/// All objects of the cluster that the agent uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Store {
    nodes: Objects<String, Node>,
    namespaces: Objects<String, Namespace>,
    services: Objects<NamespacedName, Service>,
    slices: Objects<NamespacedName, EndpointSlice>,
    pods: Objects<NamespacedName, Pod>,
    service_cidrs: Objects<String, ServiceCidr>,
    /// Service → its slices, sorted, so that a lookup does not depend on the slices of other
    /// Services.
    slices_of: BTreeMap<NamespacedName, Vec<NamespacedName>>,
    synced: bool,
    revision: u64,
}

/// Names of objects that must be compiled again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub nodes: BTreeSet<String>,
    /// Services that were added, changed or removed, or whose slices were.
    pub services: BTreeSet<NamespacedName>,
    pub namespaces: BTreeSet<String>,
    pub pods: BTreeSet<NamespacedName>,
    pub service_cidrs: BTreeSet<String>,
    /// The sources have delivered everything: objects not in the store do not exist.
    pub synced: bool,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds later changes, to compile once for both.
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
    /// Applies an event and returns what changed. An equal object is no change.
    pub fn apply(&mut self, event: SourceEvent) -> Changes {
        let mut changes = Changes::default();
        match event {
            SourceEvent::Upsert(Object::Node(node)) => {
                let name = node.name.clone();
                if upsert(&mut self.nodes, name.clone(), node) != Upserted::Unchanged {
                    changes.nodes.insert(name);
                }
            }
            SourceEvent::Upsert(Object::Service(service)) => {
                let name = service.name.clone();
                if upsert(&mut self.services, name.clone(), service) != Upserted::Unchanged {
                    changes.services.insert(name);
                }
            }
            SourceEvent::Upsert(Object::Namespace(namespace)) => {
                let name = namespace.name.clone();
                if upsert(&mut self.namespaces, name.clone(), namespace) != Upserted::Unchanged {
                    changes.namespaces.insert(name);
                }
            }
            SourceEvent::Upsert(Object::Pod(pod)) => {
                let name = pod.name.clone();
                if upsert(&mut self.pods, name.clone(), pod) != Upserted::Unchanged {
                    changes.pods.insert(name);
                }
            }
            SourceEvent::Upsert(Object::ServiceCidr(range)) => {
                let name = range.name.clone();
                if upsert(&mut self.service_cidrs, name.clone(), range) != Upserted::Unchanged {
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
            Upserted::Unchanged => return,
            Upserted::Changed(before) if before.service != service => {
                self.unlink_slice(&name, &before.service);
                changes.services.insert(before.service);
            }
            Upserted::New | Upserted::Changed(_) => {}
        }
        // most Services have one slice
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
                    self.unlink_slice(name, &slice.service);
                    changes.services.insert(slice.service);
                }
            }
        }
    }

    fn unlink_slice(&mut self, slice: &NamespacedName, service: &NamespacedName) {
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

    /// Number of slices.
    pub fn slice_count(&self) -> usize {
        self.slices.len()
    }

    /// All objects as one change, for a reader that starts late.
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

    /// The slices labelled with the Service, whether or not it exists.
    pub fn slices_of(&self, service: &NamespacedName) -> impl Iterator<Item = &EndpointSlice> + Clone {
        self.slices_of
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|name| self.slices.get(name).map(Box::as_ref))
    }

    /// Whether the sources have delivered all objects once.
    pub const fn is_synced(&self) -> bool {
        self.synced
    }

    /// Incremented by every change.
    pub const fn revision(&self) -> u64 {
        self.revision
    }
}

/// The result of an upsert.
#[derive(PartialEq)]
enum Upserted<V> {
    New,
    /// Holds the previous value.
    Changed(V),
    Unchanged,
}

fn upsert<K: Ord, V: PartialEq>(map: &mut Objects<K, V>, key: K, value: V) -> Upserted<V> {
    match map.entry(key) {
        Entry::Occupied(entry) if **entry.get() == value => Upserted::Unchanged,
        Entry::Occupied(mut entry) => Upserted::Changed(std::mem::replace(&mut **entry.get_mut(), value)),
        Entry::Vacant(entry) => {
            entry.insert(Box::new(value));
            Upserted::New
        }
    }
}

/// A late removal of an earlier incarnation (another UID) does not remove its successor.
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
mod tests;
