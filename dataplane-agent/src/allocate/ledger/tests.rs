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
fn a_node_gets_a_range_of_each_family_and_the_same_until_it_has_them() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/22", 24), ("fd00::/48", 64)]), Instant::now());
    ledger.observe(&node("a", "1", &["10.0.0.0/24", "fd00::/64"]), now);
    ledger.observe(&node("b", "2", &[]), now);
    let promised = ledger.promise("b", now).unwrap();
    assert_eq!(promised, [net("10.0.1.0/24"), net("fd00:0:0:1::/64")]);
    ledger.observe(&node("b", "2", &[]), now);
    assert_eq!(ledger.promise("b", now).unwrap(), promised, "a write whose outcome is not known is repeated");
    ledger.observe(&node("b", "2", &["10.0.1.0/24", "fd00:0:0:1::/64"]), now);
    assert_eq!(ledger.needy("b"), None);
    assert_eq!(ledger.promise("b", now).unwrap(), [], "what a node has is not written again");
}

#[test]
fn somebody_elses_assignment_frees_what_was_promised() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/23", 24)]), Instant::now());
    ledger.observe(&node("a", "1", &[]), now);
    ledger.promise("a", now).unwrap();
    ledger.observe(&node("a", "1", &["10.0.1.0/24"]), now);
    ledger.observe(&node("b", "2", &[]), now);
    assert_eq!(ledger.promise("b", now).unwrap(), [net("10.0.0.0/24")]);
}

#[test]
fn a_node_made_again_is_another_node() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/24", 24)]), Instant::now());
    ledger.observe(&node("a", "1", &["10.0.0.0/24"]), now);
    ledger.observe(&node("a", "2", &[]), now);
    assert!(ledger.needy("a").is_some());
    assert_eq!(ledger.promise("a", now).unwrap(), [net("10.0.0.0/24")]);
}

#[test]
fn one_family_that_is_full_keeps_the_others_from_being_taken() {
    let (mut ledger, now) = (ledger(&[("10.0.0.0/24", 24), ("fd00::/48", 64)]), Instant::now());
    ledger.observe(&node("a", "1", &["10.0.0.0/24", "fd00::/64"]), now);
    ledger.observe(&node("b", "2", &[]), now);
    let full = ledger.promise("b", now).unwrap_err();
    assert_eq!(full, Finding::Exhausted { cluster: net("10.0.0.0/24"), capacity: 1 });
    assert_eq!(ledger.pools()[1].used(), 1);
    ledger.remove("a", now);
    assert_eq!(ledger.promise("b", now).unwrap().len(), 2);
}

#[test]
fn what_is_wrong_with_a_node_is_said_with_both_values() {
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
    let said = ledger.findings("b")[0].to_string();
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
                    if ledger.needy(&name).is_none() {
                        continue;
                    }
                    let Ok(ranges) = ledger.promise(&name, now) else { continue };
                    let written = server.get_mut(&name).unwrap();
                    if written.pod_cidrs.is_empty() {
                        written.pod_cidrs = ranges;
                    }
                    if matches!(step, Step::Write(_)) {
                        ledger.observe(&written.clone(), now);
                    }
                }
                Step::Hear(number) => {
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
            let given: Vec<IpNet> = server.values().flat_map(|node| node.pod_cidrs.clone()).collect();
            for (place, one) in given.iter().enumerate() {
                for other in &given[place + 1..] {
                    prop_assert!(!one.contains(other) && !other.contains(one), "{one} and {other}");
                }
            }
        }
    }
}
