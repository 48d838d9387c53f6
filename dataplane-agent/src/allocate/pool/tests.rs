use proptest::prelude::*;

use super::*;

const REST: Duration = Duration::from_secs(60);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn pool(cluster: &str, mask: u8) -> Pool {
    Pool::new(net(cluster), mask, REST).unwrap()
}

#[test]
fn ranges_come_one_after_the_other_until_there_are_no_more() {
    let (mut pool, now) = (pool("10.0.0.0/22", 24), Instant::now());
    let given: Vec<_> = std::iter::from_fn(|| pool.give(now)).collect();
    assert_eq!(given, ["10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/24", "10.0.3.0/24"].map(net));
    assert_eq!((pool.used(), pool.capacity()), (4, 4));
}

#[test]
fn a_range_given_back_rests_while_there_are_others_and_is_used_when_there_are_none() {
    let (mut pool, now) = (pool("10.0.0.0/23", 24), Instant::now());
    pool.give(now);
    pool.give_back(&net("10.0.0.0/24"), now);
    assert_eq!(pool.give(now), Some(net("10.0.1.0/24")));
    assert_eq!(pool.give(now), Some(net("10.0.0.0/24")), "better than a node without a network");
    assert_eq!(pool.give(now), None);
    pool.give_back(&net("10.0.0.0/24"), now);
    assert_eq!(pool.give(now + REST), Some(net("10.0.0.0/24")));
}

#[test]
fn larger_and_smaller_ranges_of_other_times_are_gone_around() {
    let (mut pool, now) = (pool("10.0.0.0/21", 24), Instant::now());
    pool.take(&net("10.0.2.0/23"));
    pool.take(&net("10.0.4.128/25"));
    pool.take(&net("192.168.0.0/24"));
    assert_eq!(pool.used(), 3);
    let given: Vec<_> = std::iter::from_fn(|| pool.give(now)).collect();
    let left = ["10.0.5.0/24", "10.0.6.0/24", "10.0.7.0/24", "10.0.0.0/24", "10.0.1.0/24"];
    assert_eq!(given, left.map(net));
}

#[test]
fn a_range_held_twice_is_free_when_both_have_given_it_back() {
    let (mut pool, now) = (pool("10.0.0.0/24", 24), Instant::now());
    pool.take(&net("10.0.0.0/24"));
    pool.take(&net("10.0.0.0/24"));
    pool.give_back(&net("10.0.0.0/24"), now);
    assert_eq!(pool.give(now), None);
    pool.give_back(&net("10.0.0.0/24"), now);
    assert!(pool.give(now).is_some());
}

#[test]
fn a_pool_of_ipv6_may_have_more_ranges_than_anyone_could_list() {
    let (mut pool, now) = (pool("fd00::/16", 64), Instant::now());
    assert_eq!(pool.capacity(), 1 << 48);
    pool.take(&net("fd00::/20"));
    assert_eq!(pool.give(now), Some(net("fd00:1000::/64")));
    assert_eq!(pool.give(now), Some(net("fd00:1000:0:1::/64")));
}

#[test]
fn masks_that_cannot_be_are_refused_with_both_values() {
    let refused = |cluster: &str, mask| Pool::new(net(cluster), mask, REST).unwrap_err().to_string();
    assert_eq!(
        refused("10.0.0.0/24", 16),
        "node mask /16 is shorter than cluster CIDR 10.0.0.0/24: not one node would fit"
    );
    assert_eq!(
        refused("10.0.0.0/24", 31),
        "node mask /31 leaves no room for pods in 10.0.0.0/24: at most /30"
    );
    assert_eq!(
        refused("10.0.0.1/24", 26),
        "cluster CIDR 10.0.0.1/24 has bits set after its prefix: 10.0.0.0/24 is meant?"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Give,
    /// One of those held.
    GiveBack(usize),
    /// Address within the cluster's range, and a length.
    Take(u32, u8),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Give),
        2 => (0..64_usize).prop_map(Step::GiveBack),
        1 => (0..1_u32 << 12, 21..=28_u8).prop_map(|(address, length)| Step::Take(address, length)),
        1 => (0..90_u64).prop_map(Step::Wait),
    ]
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

proptest! {
    #[test]
    fn what_is_given_overlaps_nothing_held_and_none_is_refused_while_there_is_room(
        steps in proptest::collection::vec(step(), 0..200),
        seed in 0..16_u128,
    ) {
        let mut pool = pool("10.0.0.0/20", 24);
        pool.next = seed;
        let mut now = Instant::now();
        let mut held: Vec<IpNet> = Vec::new();
        let all: Vec<IpNet> = net("10.0.0.0/20").subnets(24).unwrap().collect();
        for step in steps {
            match step {
                Step::Give => match pool.give(now) {
                    Some(given) => {
                        prop_assert!(all.contains(&given));
                        prop_assert!(!held.iter().any(|other| overlap(&given, other)), "{given} of {held:?}");
                        held.push(given);
                    }
                    None => prop_assert!(all.iter().all(|one| held.iter().any(|other| overlap(one, other)))),
                },
                Step::GiveBack(which) if !held.is_empty() => {
                    let range = held.swap_remove(which % held.len());
                    pool.give_back(&range, now);
                }
                Step::GiveBack(_) => {}
                Step::Take(address, length) => {
                    let base = Ipv4Addr::from_bits(u32::from_be_bytes([10, 0, 0, 0]) + address);
                    let range = IpNet::new(base.into(), length).unwrap().trunc();
                    pool.take(&range);
                    held.push(range);
                }
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
            }
            let used = all.iter().filter(|one| held.iter().any(|other| overlap(one, other))).count();
            prop_assert_eq!(pool.used(), used as u128);
        }
        for range in held {
            pool.give_back(&range, now);
        }
        prop_assert_eq!(pool.used(), 0);
    }
}
