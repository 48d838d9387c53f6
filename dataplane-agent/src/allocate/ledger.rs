//! Which node has which ranges, and which it is to get.
//!
//! Pure: hears what nodes have, says what to write. A range promised to a node stays promised until the node has
//! ranges or is gone: a write whose outcome nobody knows is repeated with the same ranges, so that it cannot give two.
//! What a node has is never changed; what is wrong with it is a [`Finding`].

use std::{collections::BTreeMap, fmt, net::IpAddr, time::Instant};

use ipnet::IpNet;

use super::pool::Pool;

/// A node as the ledger needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    pub name: String,
    pub uid: String,
    pub resource_version: String,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// `status.addresses` of type InternalIP.
    pub internal_ips: Vec<IpAddr>,
}

/// Something an operator must know of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Two nodes have one range, whole or in part.
    Overlap { range: IpNet, other: String, other_range: IpNet },
    /// A range that is in no cluster CIDR of its family: somebody else assigns ranges too.
    Outside { range: IpNet, cluster: Option<IpNet> },
    /// Ranges are written once: a node that has one family will never get the other.
    MissingFamily { cluster: IpNet, has: Vec<IpNet> },
    /// Pods could get the address of a node.
    AddressInside { address: IpAddr, cluster: IpNet },
    /// There is no range left.
    Exhausted { cluster: IpNet, capacity: u128 },
}

/// Who has what.
#[derive(Debug)]
pub struct RangeLedger {
    /// At most one per family.
    pools: Vec<Pool>,
    nodes: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    uid: String,
    resource_version: String,
    /// What the node has.
    has: Vec<IpNet>,
    /// What it is to get.
    promised: Vec<IpNet>,
    addresses: Vec<IpAddr>,
}

impl RangeLedger {
    pub fn new(pools: Vec<Pool>) -> Self {
        Self { pools, nodes: BTreeMap::new() }
    }

    pub fn pools(&self) -> &[Pool] {
        &self.pools
    }

    /// The node is as given.
    pub fn observe(&mut self, node: &NodeFacts, now: Instant) {
        let mut promised = Vec::new();
        if let Some(mut before) = self.nodes.remove(&node.name) {
            if node.pod_cidrs.is_empty() && before.uid == node.uid {
                promised = std::mem::take(&mut before.promised);
            }
            self.give_back(before.has.iter().chain(&before.promised), now);
        }
        for range in &node.pod_cidrs {
            self.pools.iter_mut().for_each(|pool| pool.take(range));
        }
        self.nodes.insert(
            node.name.clone(),
            Entry {
                uid: node.uid.clone(),
                resource_version: node.resource_version.clone(),
                has: node.pod_cidrs.clone(),
                promised,
                addresses: node.internal_ips.clone(),
            },
        );
    }

    /// The node is gone, and what it had is free.
    pub fn remove(&mut self, name: &str, now: Instant) {
        if let Some(gone) = self.nodes.remove(name) {
            self.give_back(gone.has.iter().chain(&gone.promised), now);
        }
    }

    fn give_back<'a>(&mut self, ranges: impl Iterator<Item = &'a IpNet>, now: Instant) {
        for range in ranges {
            self.pools.iter_mut().for_each(|pool| pool.give_back(range, now));
        }
    }

    /// Names of all nodes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// Identity and version of a node that has no range yet.
    pub fn needy(&self, name: &str) -> Option<(&str, &str)> {
        let entry = self.nodes.get(name).filter(|entry| entry.has.is_empty())?;
        Some((&entry.uid, &entry.resource_version))
    }

    /// The node was written without a change of its ranges, and is of this version now.
    pub fn touched(&mut self, name: &str, resource_version: String) {
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.resource_version = resource_version;
        }
    }

    /// Identity of a node.
    pub fn uid(&self, name: &str) -> Option<&str> {
        self.nodes.get(name).map(|entry| entry.uid.as_str())
    }

    /// The ranges to write for a node: one of each family, the same ones until it has them.
    ///
    /// # Errors
    ///
    /// A family has none left; then the others keep theirs.
    pub fn promise(&mut self, name: &str, now: Instant) -> Result<Vec<IpNet>, Finding> {
        let Some(entry) = self.nodes.get_mut(name) else { return Ok(Vec::new()) };
        if !entry.promised.is_empty() || !entry.has.is_empty() {
            return Ok(entry.promised.clone());
        }
        // nothing is taken from one family that another cannot complete
        if let Some(full) = self.pools.iter().find(|pool| pool.used() == pool.capacity()) {
            return Err(Finding::Exhausted { cluster: full.cluster(), capacity: full.capacity() });
        }
        entry.promised = self.pools.iter_mut().filter_map(|pool| pool.give(now)).collect();
        Ok(entry.promised.clone())
    }

    /// What is wrong with what a node has.
    pub fn findings(&self, name: &str) -> Vec<Finding> {
        let Some(entry) = self.nodes.get(name) else { return Vec::new() };
        let mut findings = Vec::new();
        for &range in &entry.has {
            let of_family = self.pools.iter().find(|pool| same_family(&pool.cluster(), &range));
            if of_family.is_none_or(|pool| !pool.contains(&range)) {
                findings.push(Finding::Outside { range, cluster: of_family.map(Pool::cluster) });
            }
            for (other, theirs) in self.nodes.iter().filter(|(other, _)| *other != name) {
                let shared = theirs.has.iter().find(|one| one.contains(&range) || range.contains(*one));
                if let Some(&other_range) = shared {
                    findings.push(Finding::Overlap { range, other: other.clone(), other_range });
                }
            }
        }
        for pool in &self.pools {
            let cluster = pool.cluster();
            if !entry.has.is_empty() && !entry.has.iter().any(|range| same_family(&cluster, range)) {
                findings.push(Finding::MissingFamily { cluster, has: entry.has.clone() });
            }
            if let Some(&address) = entry.addresses.iter().find(|address| cluster.contains(*address)) {
                findings.push(Finding::AddressInside { address, cluster });
            }
        }
        findings
    }
}

pub(super) fn same_family(one: &IpNet, other: &IpNet) -> bool {
    one.addr().is_ipv4() == other.addr().is_ipv4()
}

impl Finding {
    /// The other node it is about.
    pub fn other(&self) -> Option<&str> {
        match self {
            Self::Overlap { other, .. } => Some(other),
            _ => None,
        }
    }

    /// The reason of the Event.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Overlap { .. } => "PodCIDROverlap",
            Self::Outside { .. } => "PodCIDROutsideCluster",
            Self::MissingFamily { .. } => "PodCIDRFamilyMissing",
            Self::AddressInside { .. } => "NodeAddressInClusterCIDR",
            Self::Exhausted { .. } => "PodCIDRsExhausted",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overlap { range, other, other_range } => write!(
                f,
                "pod CIDR {range} overlaps {other_range} of node {other}: pods of one of them are not reached; \
                 drain one node, delete its Node object and let it register again"
            ),
            Self::Outside { range, cluster: Some(cluster) } => write!(
                f,
                "pod CIDR {range} is outside of cluster CIDR {cluster}: another allocator runs, or --cluster-cidr is not \
                 what it was"
            ),
            Self::Outside { range, cluster: None } => write!(
                f,
                "pod CIDR {range} is of a family --cluster-cidr does not have: another allocator runs, or \
                 --cluster-cidr is not what it was"
            ),
            Self::MissingFamily { cluster, has } => {
                let has: Vec<_> = has.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "the node has pod CIDR {} and none of {cluster}, and pod CIDRs cannot be changed: delete its Node \
                     object and let it register again",
                    has.join(", ")
                )
            }
            Self::AddressInside { address, cluster } => write!(
                f,
                "node address {address} is inside of cluster CIDR {cluster}: pods could get the same address"
            ),
            Self::Exhausted { cluster, capacity } => write!(
                f,
                "all {capacity} ranges of cluster CIDR {cluster} are taken: the node gets no pod CIDR until another node \
                 is deleted"
            ),
        }
    }
}

#[cfg(test)]
mod tests;
