use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ledger(pools: &[(&str, u8)]) -> RangeLedger {
    let pool = |(cluster, mask): &(&str, u8)| Pool::new(net(cluster), *mask, Duration::ZERO).unwrap();
    RangeLedger::new(pools.iter().map(pool).collect())
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
fn node_gets_same_range_per_family_until_assigned() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/22", 24), ("fd00::/48", 64)]), Instant::now());
    ledger.observe(&node("a", "1", &["10.0.0.0/24", "fd00::/64"]), now);
    ledger.observe(&node("b", "2", &[]), now);
    let reserved = ledger.reserve("b", now).unwrap();
    assert_eq!(reserved, [net("10.0.1.0/24"), net("fd00:0:0:1::/64")]);
    ledger.observe(&node("b", "2", &[]), now);
    assert_eq!(ledger.reserve("b", now).unwrap(), reserved, "a write with unknown outcome is repeated");
    ledger.observe(&node("b", "2", &["10.0.1.0/24", "fd00:0:0:1::/64"]), now);
    assert_eq!(ledger.unassigned("b"), None);
    assert_eq!(ledger.reserve("b", now).unwrap(), [], "assigned ranges are not written again");
}

#[test]
fn foreign_assignment_releases_reserved_range() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/23", 24)]), Instant::now());
    ledger.observe(&node("a", "1", &[]), now);
    ledger.reserve("a", now).unwrap();
    ledger.observe(&node("a", "1", &["10.0.1.0/24"]), now);
    ledger.observe(&node("b", "2", &[]), now);
    assert_eq!(ledger.reserve("b", now).unwrap(), [net("10.0.0.0/24")]);
}

#[test]
fn recreated_node_is_a_new_node() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/24", 24)]), Instant::now());
    ledger.observe(&node("a", "1", &["10.0.0.0/24"]), now);
    ledger.observe(&node("a", "2", &[]), now);
    assert!(ledger.unassigned("a").is_some());
    assert_eq!(ledger.reserve("a", now).unwrap(), [net("10.0.0.0/24")]);
}

#[test]
fn exhausted_family_reserves_nothing_in_others() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/24", 24), ("fd00::/48", 64)]), Instant::now());
    ledger.observe(&node("a", "1", &["10.0.0.0/24", "fd00::/64"]), now);
    ledger.observe(&node("b", "2", &[]), now);
    let exhausted = ledger.reserve("b", now).unwrap_err();
    assert_eq!(exhausted, Finding::Exhausted { cluster: net("10.0.0.0/24"), capacity: 1 });
    assert_eq!(ledger.pools()[1].used(), 1);
    ledger.remove("a", now);
    assert_eq!(ledger.reserve("b", now).unwrap().len(), 2);
}

#[test]
fn findings_name_both_values() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/16", 24), ("fd00::/48", 64)]), Instant::now());
    ledger.observe(&node("a", "1", &["10.0.0.0/24", "fd00::/64"]), now);
    ledger.observe(&node("b", "2", &["10.0.0.0/25"]), now);
    let mut c = node("c", "3", &["192.168.0.0/24", "fd00:0:0:3::/64"]);
    c.internal_ips = vec!["10.0.9.9".parse().unwrap()];
    ledger.observe(&c, now);
    let reasons = |name: &str| ledger.findings(name).iter().map(Finding::reason).collect::<Vec<_>>();
    assert_eq!(reasons("a"), ["PodCIDROverlap"]);
    assert_eq!(reasons("b"), ["PodCIDROverlap", "PodCIDRFamilyMissing"]);
    assert_eq!(reasons("c"), ["PodCIDROutsideCluster", "NodeAddressInClusterCIDR"]);
    let message = ledger.findings("b")[0].to_string();
    assert!(message.starts_with("pod CIDR 10.0.0.0/25 overlaps 10.0.0.0/24 of node a"), "{message}");
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A node registers, or registers again.
    Join(u8),
    Leave(u8),
    /// The reserved ranges are written.
    Write(u8),
    /// The write succeeds, but its response is lost.
    LostWrite(u8),
    /// A watch event of the node arrives.
    WatchEvent(u8),
    /// The allocator restarts and lists all nodes.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0..8_u8;
    prop_oneof![
        name.clone().prop_map(Step::Join),
        name.clone().prop_map(Step::Leave),
        name.clone().prop_map(Step::Write),
        name.clone().prop_map(Step::LostWrite),
        name.prop_map(Step::WatchEvent),
        Just(Step::Restart),
    ]
}

proptest! {
    /// Against a model of an API server that rejects writes to changed nodes.
    #[test]
    fn ranges_of_nodes_never_overlap(steps in proptest::collection::vec(step(), 0..300)) {
        let new = || ledger(&[("10.0.0.0/21", 24), ("fd00::/60", 64)]);
        let now = Instant::now();
        let mut server: BTreeMap<String, NodeFacts> = BTreeMap::new();
        let mut ledger = new();
        let mut uids = 0;
        for step in steps {
            match step {
                Step::Join(number) => {
                    uids += 1;
                    let joined = node(&format!("n{number}"), &uids.to_string(), &[]);
                    ledger.observe(&joined, now);
                    server.insert(joined.name.clone(), joined);
                }
                Step::Leave(number) => {
                    server.remove(&format!("n{number}"));
                    ledger.remove(&format!("n{number}"), now);
                }
                Step::Write(number) | Step::LostWrite(number) => {
                    let name = format!("n{number}");
                    if ledger.unassigned(&name).is_none() {
                        continue;
                    }
                    let Ok(ranges) = ledger.reserve(&name, now) else { continue };
                    let written = server.get_mut(&name).unwrap();
                    if written.pod_cidrs.is_empty() {
                        written.pod_cidrs = ranges;
                    }
                    if matches!(step, Step::Write(_)) {
                        ledger.observe(&written.clone(), now);
                    }
                }
                Step::WatchEvent(number) => {
                    if let Some(node) = server.get(&format!("n{number}")) {
                        ledger.observe(node, now);
                    }
                }
                Step::Restart => {
                    ledger = new();
                    for node in server.values() {
                        ledger.observe(node, now);
                    }
                }
            }
            let assigned: Vec<IpNet> = server.values().flat_map(|node| node.pod_cidrs.clone()).collect();
            for (place, one) in assigned.iter().enumerate() {
                for other in &assigned[place + 1..] {
                    prop_assert!(!one.contains(other) && !other.contains(one), "{one} and {other}");
                }
            }
        }
    }
}
