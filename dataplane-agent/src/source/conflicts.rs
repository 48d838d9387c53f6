//! Objects that exclude each other: two Services with one cluster IP, two Nodes with overlapping
//! pod CIDRs.
//!
//! Runs between a source and the state. The object delivered first owns the resource. A later
//! object with the same resource waits: its earlier version (if any) stays in the state, and it is
//! delivered once the owner releases the resource. Delivered objects never conflict.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;

use crate::state::{Object, ObjectKey, Owner, SourceEvent};

/// Holds back events for objects that conflict with delivered objects.
#[derive(Debug, Default)]
pub struct ConflictResolver {
    owners: ResourceOwners,
    /// Objects that wait for a resource, in order of arrival.
    waiting: BTreeMap<u64, Object>,
    sequence_of: BTreeMap<ObjectKey, u64>,
    next_sequence: u64,
}

/// A resource that only one object can own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    ClusterIp(IpAddr),
    PodCidr(IpNet),
}

/// The resources of delivered objects.
#[derive(Debug, Default)]
struct ResourceOwners {
    by_key: BTreeMap<ObjectKey, (Owner, Vec<Resource>)>,
    cluster_ips: HashMap<IpAddr, ObjectKey>,
    /// By first address; no two overlap.
    pod_cidrs: BTreeMap<IpAddr, (IpNet, ObjectKey)>,
}

impl ConflictResolver {
    /// Takes one batch of events and returns what can be delivered now, including objects that
    /// waited.
    pub fn apply(&mut self, events: impl IntoIterator<Item = SourceEvent>) -> Vec<SourceEvent> {
        let (mut out, mut synced) = (Vec::new(), false);
        for event in events {
            match event {
                // these never conflict
                SourceEvent::Upsert(
                    Object::EndpointSlice(_) | Object::Namespace(_) | Object::Pod(_) | Object::ServiceCidr(_),
                )
                | SourceEvent::Remove(
                    ObjectKey::EndpointSlice(_)
                    | ObjectKey::Namespace(_)
                    | ObjectKey::Pod(_)
                    | ObjectKey::ServiceCidr(_),
                    _,
                ) => out.push(event),
                SourceEvent::Upsert(object) => self.queue(object),
                SourceEvent::Remove(key, _) => self.remove(&key, &mut out),
                SourceEvent::Synced => synced = true,
            }
        }
        while self.deliver_free(&mut out) || self.deliver_swaps(&mut out) {}
        out.extend(synced.then_some(SourceEvent::Synced));
        out
    }

    /// Number of waiting objects.
    pub fn waiting(&self) -> usize {
        self.sequence_of.len()
    }

    /// Waiting objects, each with the reason.
    pub fn waiting_reasons(&self) -> impl Iterator<Item = (&ObjectKey, String)> {
        self.sequence_of.iter().filter_map(|(key, sequence)| {
            let needed = resources(self.waiting.get(sequence)?);
            let (resource, owner) =
                needed.iter().find_map(|one| Some((one, self.owners.other_owners(key, &[*one]).pop()?)))?;
            let kept = if self.owners.by_key.contains_key(key) {
                "; its previous version stays applied"
            } else {
                ""
            };
            Some((
                key,
                format!("{resource} is already used by {owner}: not applied until {owner} releases it{kept}"),
            ))
        })
    }

    fn queue(&mut self, object: Object) {
        let sequence = *self.sequence_of.entry(object.key()).or_insert(self.next_sequence);
        self.next_sequence += 1;
        self.waiting.insert(sequence, object);
    }

    fn remove(&mut self, key: &ObjectKey, out: &mut Vec<SourceEvent>) {
        if let Some(sequence) = self.sequence_of.remove(key) {
            self.waiting.remove(&sequence);
        }
        // the delivered incarnation, which may differ from the removed one
        if let Some(owner) = self.owners.release(key) {
            out.push(SourceEvent::Remove(key.clone(), owner));
        }
    }

    /// Delivers every object whose resources are free. Returns whether that freed other resources.
    fn deliver_free(&mut self, out: &mut Vec<SourceEvent>) -> bool {
        let mut freed = false;
        for (sequence, object) in std::mem::take(&mut self.waiting) {
            let (key, needed) = (object.key(), resources(&object));
            if self.owners.other_owners(&key, &needed).is_empty() {
                self.sequence_of.remove(&key);
                freed |= self.deliver(object, key, needed, out);
            } else {
                self.waiting.insert(sequence, object);
            }
        }
        freed
    }

    /// Delivers objects that wait only for each other, such as two Services that swap their cluster
    /// IPs. Returns whether there were any.
    fn deliver_swaps(&mut self, out: &mut Vec<SourceEvent>) -> bool {
        let mut group = self.mutually_blocked();
        let found = !group.is_empty();
        while !group.is_empty() {
            let free =
                group.iter().position(|(key, needed)| self.owners.other_owners(key, needed).is_empty());
            if let Some(free) = free {
                let (key, needed) = group.remove(free);
                if let Some(object) =
                    self.sequence_of.remove(&key).and_then(|sequence| self.waiting.remove(&sequence))
                {
                    self.deliver(object, key, needed, out);
                }
                continue;
            }
            // a cycle: remove one delivered object first to break it
            let (key, needed) = &group[0];
            let Some(other) = self.owners.other_owners(key, needed).pop().cloned() else { break };
            if let Some(owner) = self.owners.release(&other) {
                out.push(SourceEvent::Remove(other, owner));
            }
        }
        found
    }

    fn mutually_blocked(&self) -> Vec<(ObjectKey, Vec<Resource>)> {
        let mut group: Vec<_> = self
            .waiting
            .values()
            .map(|object| (object.key(), resources(object)))
            .filter(|(key, _)| self.owners.by_key.contains_key(key))
            .collect();
        loop {
            let members: BTreeSet<_> = group.iter().map(|(key, _)| key.clone()).collect();
            let mut granted: Vec<Resource> = Vec::new();
            group.retain(|(key, needed)| {
                let keep = self.owners.other_owners(key, needed).iter().all(|other| members.contains(*other))
                    && !needed.iter().any(|one| granted.iter().any(|other| one.excludes(*other)));
                if keep {
                    granted.extend(needed);
                }
                keep
            });
            if group.len() == members.len() {
                return group;
            }
        }
    }

    /// Returns whether the object released a resource it owned before.
    fn deliver(
        &mut self,
        object: Object,
        key: ObjectKey,
        needed: Vec<Resource>,
        out: &mut Vec<SourceEvent>,
    ) -> bool {
        let before = self.owners.by_key.get(&key).map(|(_, owned)| owned.clone()).unwrap_or_default();
        let freed = before.iter().any(|owned| !needed.contains(owned));
        self.owners.release(&key);
        self.owners.acquire(key, *object.owner(), needed);
        out.push(SourceEvent::Upsert(object));
        freed
    }
}

impl ResourceOwners {
    fn acquire(&mut self, key: ObjectKey, owner: Owner, resources: Vec<Resource>) {
        for resource in &resources {
            match *resource {
                Resource::ClusterIp(ip) => {
                    self.cluster_ips.insert(ip, key.clone());
                }
                Resource::PodCidr(cidr) => {
                    self.pod_cidrs.insert(cidr.network(), (cidr, key.clone()));
                }
            }
        }
        self.by_key.insert(key, (owner, resources));
    }

    fn release(&mut self, key: &ObjectKey) -> Option<Owner> {
        let (owner, resources) = self.by_key.remove(key)?;
        for resource in resources {
            match resource {
                Resource::ClusterIp(ip) => {
                    self.cluster_ips.remove(&ip);
                }
                Resource::PodCidr(cidr) => {
                    self.pod_cidrs.remove(&cidr.network());
                }
            }
        }
        Some(owner)
    }

    /// Other objects that own one of these resources.
    fn other_owners(&self, key: &ObjectKey, needed: &[Resource]) -> Vec<&ObjectKey> {
        let owners = needed.iter().flat_map(|resource| match *resource {
            Resource::ClusterIp(ip) => self.cluster_ips.get(&ip).into_iter().collect(),
            Resource::PodCidr(cidr) => self.overlapping(cidr),
        });
        owners.filter(|owner| *owner != key).collect()
    }

    fn overlapping(&self, cidr: IpNet) -> Vec<&ObjectKey> {
        // ranges that start inside, and the last one that starts before
        let inside = self.pod_cidrs.range(cidr.network()..=cidr.broadcast());
        let before = self.pod_cidrs.range(..cidr.network()).next_back();
        let overlaps = |owned: &IpNet| Resource::PodCidr(*owned).excludes(Resource::PodCidr(cidr));
        before
            .into_iter()
            .chain(inside)
            .filter(|(_, (owned, _))| overlaps(owned))
            .map(|(_, (_, key))| key)
            .collect()
    }
}

impl Resource {
    fn excludes(self, other: Self) -> bool {
        match (self, other) {
            (Self::ClusterIp(one), Self::ClusterIp(other)) => one == other,
            (Self::PodCidr(one), Self::PodCidr(other)) => one.contains(&other) || other.contains(&one),
            _ => false,
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClusterIp(ip) => write!(f, "cluster IP {ip}"),
            Self::PodCidr(cidr) => write!(f, "part of pod CIDR {cidr}"),
        }
    }
}

fn resources(object: &Object) -> Vec<Resource> {
    match object {
        Object::Node(node) => node.pod_cidrs.iter().copied().map(Resource::PodCidr).collect(),
        Object::Service(service) => service.cluster_ips.iter().copied().map(Resource::ClusterIp).collect(),
        Object::EndpointSlice(_) | Object::Namespace(_) | Object::Pod(_) | Object::ServiceCidr(_) => {
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests;
