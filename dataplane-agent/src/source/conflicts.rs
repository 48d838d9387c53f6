//! Objects that exclude each other: two services of one cluster IP, two nodes of overlapping pod CIDRs.
//!
//! Stands between any source and the state. Who was delivered first keeps what it has; the other is refused, its
//! earlier state (if any) stays, and it is delivered when the holder goes. At every moment, what was delivered is free
//! of conflicts.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;

use crate::state::{Object, ObjectKey, Owner, SourceEvent};

/// Lets events through that do not collide with what it let through before.
#[derive(Debug, Default)]
pub struct Conflicts {
    held: Held,
    /// Refused objects, in the order they came.
    waiting: BTreeMap<u64, Object>,
    turn_of: BTreeMap<ObjectKey, u64>,
    next_turn: u64,
}

/// What only one object can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    ClusterIp(IpAddr),
    PodCidr(IpNet),
}

/// What delivered objects have.
#[derive(Debug, Default)]
struct Held {
    by_key: BTreeMap<ObjectKey, (Owner, Vec<Resource>)>,
    cluster_ips: HashMap<IpAddr, ObjectKey>,
    /// By first address; no two overlap.
    pod_cidrs: BTreeMap<IpAddr, (IpNet, ObjectKey)>,
}

impl Conflicts {
    /// Of events that came together, and of those refused earlier, the ones that can be believed now.
    pub fn apply(&mut self, events: impl IntoIterator<Item = SourceEvent>) -> Vec<SourceEvent> {
        let (mut out, mut synced) = (Vec::new(), false);
        for event in events {
            match event {
                // nobody excludes these
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
        while self.admit(&mut out) || self.exchange(&mut out) {}
        out.extend(synced.then_some(SourceEvent::Synced));
        out
    }

    /// How many objects wait.
    pub fn waiting(&self) -> usize {
        self.turn_of.len()
    }

    /// Objects that wait, each with the reason.
    pub fn refused(&self) -> impl Iterator<Item = (&ObjectKey, String)> {
        self.turn_of.iter().filter_map(|(key, turn)| {
            let wanted = resources(self.waiting.get(turn)?);
            let (resource, holder) =
                wanted.iter().find_map(|one| Some((one, self.held.blockers(key, &[*one]).pop()?)))?;
            let stays = if self.held.by_key.contains_key(key) { "; its earlier state stays" } else { "" };
            Some((key, format!("{resource} is held by {holder}: refused until that goes{stays}")))
        })
    }

    fn queue(&mut self, object: Object) {
        let turn = *self.turn_of.entry(object.key()).or_insert(self.next_turn);
        self.next_turn += 1;
        self.waiting.insert(turn, object);
    }

    fn remove(&mut self, key: &ObjectKey, out: &mut Vec<SourceEvent>) {
        if let Some(turn) = self.turn_of.remove(key) {
            self.waiting.remove(&turn);
        }
        // the incarnation that was delivered, which need not be the one that is gone
        if let Some(owner) = self.held.release(key) {
            out.push(SourceEvent::Remove(key.clone(), owner));
        }
    }

    /// Delivers whom nobody blocks. Whether that made room for others.
    fn admit(&mut self, out: &mut Vec<SourceEvent>) -> bool {
        let mut room = false;
        for (turn, object) in std::mem::take(&mut self.waiting) {
            let (key, wanted) = (object.key(), resources(&object));
            if self.held.blockers(&key, &wanted).is_empty() {
                self.turn_of.remove(&key);
                room |= self.deliver(object, key, wanted, out);
            } else {
                self.waiting.insert(turn, object);
            }
        }
        room
    }

    /// Delivers objects that block only each other (two services swap their addresses). Whether there were any.
    fn exchange(&mut self, out: &mut Vec<SourceEvent>) -> bool {
        let mut group = self.blocking_each_other();
        let found = !group.is_empty();
        while !group.is_empty() {
            let free = group.iter().position(|(key, wanted)| self.held.blockers(key, wanted).is_empty());
            if let Some(free) = free {
                let (key, wanted) = group.remove(free);
                if let Some(object) = self.turn_of.remove(&key).and_then(|turn| self.waiting.remove(&turn)) {
                    self.deliver(object, key, wanted, out);
                }
                continue;
            }
            // a ring: one of them lets go first, for as long as it takes to go round
            let (key, wanted) = &group[0];
            let Some(blocker) = self.held.blockers(key, wanted).pop().cloned() else { break };
            if let Some(owner) = self.held.release(&blocker) {
                out.push(SourceEvent::Remove(blocker, owner));
            }
        }
        found
    }

    fn blocking_each_other(&self) -> Vec<(ObjectKey, Vec<Resource>)> {
        let mut group: Vec<_> = self
            .waiting
            .values()
            .map(|object| (object.key(), resources(object)))
            .filter(|(key, _)| self.held.by_key.contains_key(key))
            .collect();
        loop {
            let members: BTreeSet<_> = group.iter().map(|(key, _)| key.clone()).collect();
            let mut granted: Vec<Resource> = Vec::new();
            group.retain(|(key, wanted)| {
                let stays = self.held.blockers(key, wanted).iter().all(|blocker| members.contains(*blocker))
                    && !wanted.iter().any(|one| granted.iter().any(|other| one.excludes(*other)));
                if stays {
                    granted.extend(wanted);
                }
                stays
            });
            if group.len() == members.len() {
                return group;
            }
        }
    }

    /// Whether something it held until now is free.
    fn deliver(
        &mut self,
        object: Object,
        key: ObjectKey,
        wanted: Vec<Resource>,
        out: &mut Vec<SourceEvent>,
    ) -> bool {
        let before = self.held.by_key.get(&key).map(|(_, held)| held.clone()).unwrap_or_default();
        let room = before.iter().any(|held| !wanted.contains(held));
        self.held.release(&key);
        self.held.hold(key, *object.owner(), wanted);
        out.push(SourceEvent::Upsert(object));
        room
    }
}

impl Held {
    fn hold(&mut self, key: ObjectKey, owner: Owner, resources: Vec<Resource>) {
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

    /// Others that hold some of what `key` wants.
    fn blockers(&self, key: &ObjectKey, wanted: &[Resource]) -> Vec<&ObjectKey> {
        let holders = wanted.iter().flat_map(|resource| match *resource {
            Resource::ClusterIp(ip) => self.cluster_ips.get(&ip).into_iter().collect(),
            Resource::PodCidr(cidr) => self.overlapping(cidr),
        });
        holders.filter(|holder| *holder != key).collect()
    }

    fn overlapping(&self, cidr: IpNet) -> Vec<&ObjectKey> {
        // those that begin inside, and the last that begins before
        let inside = self.pod_cidrs.range(cidr.network()..=cidr.broadcast());
        let before = self.pod_cidrs.range(..cidr.network()).next_back();
        let overlaps = |held: &IpNet| Resource::PodCidr(*held).excludes(Resource::PodCidr(cidr));
        before
            .into_iter()
            .chain(inside)
            .filter(|(_, (held, _))| overlaps(held))
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
            Self::PodCidr(cidr) => write!(f, "some of pod CIDR {cidr}"),
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
