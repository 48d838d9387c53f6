//! Which node has which ranges, and which it is to get.
//!
//! Pure: hears what nodes have, says what to write. A range promised to a node stays promised until the node has
//! ranges or is gone: a write whose outcome nobody knows is repeated with the same ranges, so that it cannot give two.
//! What a node has is never changed; what is wrong with it is a [`Finding`].

use std::{collections::BTreeMap, fmt, net::IpAddr, time::Instant};

use ipnet::IpNet;

use super::pool::Pool;

/// A node as the book needs it.
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
pub struct Book {
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

impl Book {
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
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn book(pools: &[(&str, u8)]) -> Book {
        let pool = |(cluster, mask): &(&str, u8)| Pool::new(net(cluster), *mask, Duration::ZERO).unwrap();
        Book::new(pools.iter().map(pool).collect())
    }

    fn node(name: &str, uid: &str, cidrs: &[&str]) -> NodeFacts {
        NodeFacts {
            name: name.to_owned(),
            uid: uid.to_owned(),
            resource_version: "1".to_owned(),
            pod_cidrs: cidrs.iter().map(|cidr| net(cidr)).collect(),
            internal_ips: Vec::new(),
        }
    }

    #[test]
    fn a_node_gets_a_range_of_each_family_and_the_same_until_it_has_them() {
        let (mut book, now) = (book(&[("10.0.0.0/22", 24), ("fd00::/48", 64)]), Instant::now());
        book.observe(&node("a", "1", &["10.0.0.0/24", "fd00::/64"]), now);
        book.observe(&node("b", "2", &[]), now);
        let promised = book.promise("b", now).unwrap();
        assert_eq!(promised, [net("10.0.1.0/24"), net("fd00:0:0:1::/64")]);
        book.observe(&node("b", "2", &[]), now);
        assert_eq!(
            book.promise("b", now).unwrap(),
            promised,
            "a write whose outcome is not known is repeated"
        );
        book.observe(&node("b", "2", &["10.0.1.0/24", "fd00:0:0:1::/64"]), now);
        assert_eq!(book.needy("b"), None);
        assert_eq!(book.promise("b", now).unwrap(), [], "what a node has is not written again");
    }

    #[test]
    fn somebody_elses_assignment_frees_what_was_promised() {
        let (mut book, now) = (book(&[("10.0.0.0/23", 24)]), Instant::now());
        book.observe(&node("a", "1", &[]), now);
        book.promise("a", now).unwrap();
        book.observe(&node("a", "1", &["10.0.1.0/24"]), now);
        book.observe(&node("b", "2", &[]), now);
        assert_eq!(book.promise("b", now).unwrap(), [net("10.0.0.0/24")]);
    }

    #[test]
    fn a_node_made_again_is_another_node() {
        let (mut book, now) = (book(&[("10.0.0.0/24", 24)]), Instant::now());
        book.observe(&node("a", "1", &["10.0.0.0/24"]), now);
        book.observe(&node("a", "2", &[]), now);
        assert!(book.needy("a").is_some());
        assert_eq!(book.promise("a", now).unwrap(), [net("10.0.0.0/24")]);
    }

    #[test]
    fn one_family_that_is_full_keeps_the_others_from_being_taken() {
        let (mut book, now) = (book(&[("10.0.0.0/24", 24), ("fd00::/48", 64)]), Instant::now());
        book.observe(&node("a", "1", &["10.0.0.0/24", "fd00::/64"]), now);
        book.observe(&node("b", "2", &[]), now);
        let full = book.promise("b", now).unwrap_err();
        assert_eq!(full, Finding::Exhausted { cluster: net("10.0.0.0/24"), capacity: 1 });
        assert_eq!(book.pools()[1].used(), 1);
        book.remove("a", now);
        assert_eq!(book.promise("b", now).unwrap().len(), 2);
    }

    #[test]
    fn what_is_wrong_with_a_node_is_said_with_both_values() {
        let (mut book, now) = (book(&[("10.0.0.0/16", 24), ("fd00::/48", 64)]), Instant::now());
        book.observe(&node("a", "1", &["10.0.0.0/24", "fd00::/64"]), now);
        book.observe(&node("b", "2", &["10.0.0.0/25"]), now);
        let mut c = node("c", "3", &["192.168.0.0/24", "fd00:0:0:3::/64"]);
        c.internal_ips = vec!["10.0.9.9".parse().unwrap()];
        book.observe(&c, now);
        let reasons = |name: &str| book.findings(name).iter().map(Finding::reason).collect::<Vec<_>>();
        assert_eq!(reasons("a"), ["PodCIDROverlap"]);
        assert_eq!(reasons("b"), ["PodCIDROverlap", "PodCIDRFamilyMissing"]);
        assert_eq!(reasons("c"), ["PodCIDROutsideCluster", "NodeAddressInClusterCIDR"]);
        let said = book.findings("b")[0].to_string();
        assert!(said.starts_with("pod CIDR 10.0.0.0/25 overlaps 10.0.0.0/24 of node a"), "{said}");
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// A node registers, or registers anew.
        Join(u8),
        Leave(u8),
        /// We write what was promised.
        Write(u8),
        /// The write is in the API server, and we do not know.
        LostWrite(u8),
        /// The watch tells how the node is.
        Hear(u8),
        /// The allocator ends, and another one lists all nodes.
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        let name = 0..8_u8;
        prop_oneof![
            name.clone().prop_map(Step::Join),
            name.clone().prop_map(Step::Leave),
            name.clone().prop_map(Step::Write),
            name.clone().prop_map(Step::LostWrite),
            name.prop_map(Step::Hear),
            Just(Step::Restart),
        ]
    }

    proptest! {
        /// Against a model of the API server that refuses writes to nodes that changed.
        #[test]
        fn no_two_nodes_ever_have_one_range(steps in proptest::collection::vec(step(), 0..300)) {
            let new = || book(&[("10.0.0.0/21", 24), ("fd00::/60", 64)]);
            let now = Instant::now();
            let mut server: BTreeMap<String, NodeFacts> = BTreeMap::new();
            let mut book = new();
            let mut uids = 0;
            for step in steps {
                match step {
                    Step::Join(number) => {
                        uids += 1;
                        let joined = node(&format!("n{number}"), &uids.to_string(), &[]);
                        book.observe(&joined, now);
                        server.insert(joined.name.clone(), joined);
                    }
                    Step::Leave(number) => {
                        server.remove(&format!("n{number}"));
                        book.remove(&format!("n{number}"), now);
                    }
                    Step::Write(number) | Step::LostWrite(number) => {
                        let name = format!("n{number}");
                        if book.needy(&name).is_none() {
                            continue;
                        }
                        let Ok(ranges) = book.promise(&name, now) else { continue };
                        let written = server.get_mut(&name).unwrap();
                        if written.pod_cidrs.is_empty() {
                            written.pod_cidrs = ranges;
                        }
                        if matches!(step, Step::Write(_)) {
                            book.observe(&written.clone(), now);
                        }
                    }
                    Step::Hear(number) => {
                        if let Some(node) = server.get(&format!("n{number}")) {
                            book.observe(node, now);
                        }
                    }
                    Step::Restart => {
                        book = new();
                        for node in server.values() {
                            book.observe(node, now);
                        }
                    }
                }
                let given: Vec<IpNet> = server.values().flat_map(|node| node.pod_cidrs.clone()).collect();
                for (place, one) in given.iter().enumerate() {
                    for other in &given[place + 1..] {
                        prop_assert!(!one.contains(other) && !other.contains(one), "{one} and {other}");
                    }
                }
            }
        }
    }
}
