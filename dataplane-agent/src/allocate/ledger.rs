//! Which node has which ranges, and which are reserved for it.
//!
//! Pure: takes the observed nodes, returns the ranges to write. A reserved range stays reserved
//! until the node has ranges or is deleted: a write with unknown outcome is repeated with the same
//! ranges. Assigned ranges are never changed; problems with them are [`Finding`]s.

use std::{collections::BTreeMap, fmt, net::IpAddr, time::Instant};

use ipnet::IpNet;

use super::pool::Pool;

/// The fields of a node the ledger needs.
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

/// A problem of a node for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The ranges of two nodes overlap.
    Overlap { range: IpNet, other: String, other_range: IpNet },
    /// A range outside of all cluster CIDRs: another allocator is active.
    Outside { range: IpNet, cluster: Option<IpNet> },
    /// The node lacks a family. `spec.podCIDRs` is immutable, so it never gets one.
    MissingFamily { cluster: IpNet, assigned: Vec<IpNet> },
    /// A node address is inside of a cluster CIDR: a pod could get the same address.
    AddressInside { address: IpAddr, cluster: IpNet },
    /// A cluster CIDR has no free range.
    Exhausted { cluster: IpNet, capacity: u128 },
}

/// The ranges of all nodes.
#[derive(Debug)]
pub struct RangeLedger {
    /// At most one per family.
    pools: Vec<Pool>,
    nodes: BTreeMap<String, NodeEntry>,
}

#[derive(Debug)]
struct NodeEntry {
    uid: String,
    resource_version: String,
    /// Assigned ranges (`spec.podCIDRs`).
    assigned: Vec<IpNet>,
    /// Ranges reserved for the node.
    reserved: Vec<IpNet>,
    addresses: Vec<IpAddr>,
}

impl RangeLedger {
    pub fn new(pools: Vec<Pool>) -> Self {
        Self { pools, nodes: BTreeMap::new() }
    }

    pub fn pools(&self) -> &[Pool] {
        &self.pools
    }

    /// Records the observed node.
    pub fn observe(&mut self, node: &NodeFacts, now: Instant) {
        let mut reserved = Vec::new();
        if let Some(mut before) = self.nodes.remove(&node.name) {
            if node.pod_cidrs.is_empty() && before.uid == node.uid {
                reserved = std::mem::take(&mut before.reserved);
            }
            self.release(before.assigned.iter().chain(&before.reserved), now);
        }
        for range in &node.pod_cidrs {
            self.pools.iter_mut().for_each(|pool| pool.occupy(range));
        }
        self.nodes.insert(
            node.name.clone(),
            NodeEntry {
                uid: node.uid.clone(),
                resource_version: node.resource_version.clone(),
                assigned: node.pod_cidrs.clone(),
                reserved,
                addresses: node.internal_ips.clone(),
            },
        );
    }

    /// Removes a node and releases its ranges.
    pub fn remove(&mut self, name: &str, now: Instant) {
        if let Some(removed) = self.nodes.remove(name) {
            self.release(removed.assigned.iter().chain(&removed.reserved), now);
        }
    }

    fn release<'a>(&mut self, ranges: impl Iterator<Item = &'a IpNet>, now: Instant) {
        for range in ranges {
            self.pools.iter_mut().for_each(|pool| pool.release(range, now));
        }
    }

    /// Names of all nodes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// UID and resourceVersion of a node without a range.
    pub fn unassigned(&self, name: &str) -> Option<(&str, &str)> {
        let entry = self.nodes.get(name).filter(|entry| entry.assigned.is_empty())?;
        Some((&entry.uid, &entry.resource_version))
    }

    /// Records the new version of a node whose ranges did not change.
    pub fn set_resource_version(&mut self, name: &str, resource_version: String) {
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.resource_version = resource_version;
        }
    }

    /// UID of a node.
    pub fn uid(&self, name: &str) -> Option<&str> {
        self.nodes.get(name).map(|entry| entry.uid.as_str())
    }

    /// Reserves the ranges of a node: one per family, the same until it has them.
    ///
    /// # Errors
    ///
    /// A family is exhausted; nothing is reserved then.
    pub fn reserve(&mut self, name: &str, now: Instant) -> Result<Vec<IpNet>, Finding> {
        let Some(entry) = self.nodes.get_mut(name) else { return Ok(Vec::new()) };
        if !entry.reserved.is_empty() || !entry.assigned.is_empty() {
            return Ok(entry.reserved.clone());
        }
        // reserve all families or none
        if let Some(full) = self.pools.iter().find(|pool| pool.used() == pool.capacity()) {
            return Err(Finding::Exhausted { cluster: full.cluster(), capacity: full.capacity() });
        }
        entry.reserved = self.pools.iter_mut().filter_map(|pool| pool.allocate(now)).collect();
        Ok(entry.reserved.clone())
    }

    /// The problems of a node.
    pub fn findings(&self, name: &str) -> Vec<Finding> {
        let Some(entry) = self.nodes.get(name) else { return Vec::new() };
        let mut findings = Vec::new();
        for &range in &entry.assigned {
            let of_family = self.pools.iter().find(|pool| same_family(&pool.cluster(), &range));
            if of_family.is_none_or(|pool| !pool.contains(&range)) {
                findings.push(Finding::Outside { range, cluster: of_family.map(Pool::cluster) });
            }
            for (other, theirs) in self.nodes.iter().filter(|(other, _)| *other != name) {
                let shared = theirs.assigned.iter().find(|one| one.contains(&range) || range.contains(*one));
                if let Some(&other_range) = shared {
                    findings.push(Finding::Overlap { range, other: other.clone(), other_range });
                }
            }
        }
        for pool in &self.pools {
            let cluster = pool.cluster();
            if !entry.assigned.is_empty() && !entry.assigned.iter().any(|range| same_family(&cluster, range))
            {
                findings.push(Finding::MissingFamily { cluster, assigned: entry.assigned.clone() });
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
    /// The other node of an overlap.
    pub fn other(&self) -> Option<&str> {
        match self {
            Self::Overlap { other, .. } => Some(other),
            _ => None,
        }
    }

    /// The reason of the Event, and the label of the metric.
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
                "pod CIDR {range} overlaps {other_range} of node {other}: pods of one of them are unreachable; \
                 drain one node, delete its Node object and let it register again"
            ),
            Self::Outside { range, cluster: Some(cluster) } => write!(
                f,
                "pod CIDR {range} is outside of cluster CIDR {cluster}: another allocator is active, or --cluster-cidr \
                 was changed"
            ),
            Self::Outside { range, cluster: None } => write!(
                f,
                "pod CIDR {range} is of a family that --cluster-cidr does not contain: another allocator is active, \
                 or --cluster-cidr was changed"
            ),
            Self::MissingFamily { cluster, assigned } => {
                let assigned: Vec<_> = assigned.iter().map(ToString::to_string).collect();
                write!(
                    f,
                    "node has pod CIDR {} but none of {cluster}, and spec.podCIDRs is immutable: delete the Node \
                     object and let the node register again",
                    assigned.join(", ")
                )
            }
            Self::AddressInside { address, cluster } => write!(
                f,
                "node address {address} is inside of cluster CIDR {cluster}: a pod could get the same address"
            ),
            Self::Exhausted { cluster, capacity } => write!(
                f,
                "all {capacity} ranges of cluster CIDR {cluster} are assigned: the node gets no pod CIDR until another node \
                 is deleted"
            ),
        }
    }
}

#[cfg(test)]
mod tests;
