use proptest::prelude::*;

use super::*;

const REUSE_DELAY: Duration = Duration::from_secs(60);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn pool(cluster: &str, mask: u8) -> Pool {
    Pool::new(net(cluster), mask, REUSE_DELAY).unwrap()
}

#[test]
fn ranges_are_allocated_in_order_until_exhausted() {
    let (mut pool, now) = (pool("10.0.0.0/22", 24), Instant::now());
    let allocated: Vec<_> = std::iter::from_fn(|| pool.allocate(now)).collect();
    assert_eq!(allocated, ["10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/24", "10.0.3.0/24"].map(net));
    assert_eq!((pool.used(), pool.capacity()), (4, 4));
}

#[test]
fn released_range_is_reused_early_only_if_no_other_is_free() {
    let (mut pool, now) = (pool("10.0.0.0/23", 24), Instant::now());
    pool.allocate(now);
    pool.release(&net("10.0.0.0/24"), now);
    assert_eq!(pool.allocate(now), Some(net("10.0.1.0/24")));
    assert_eq!(pool.allocate(now), Some(net("10.0.0.0/24")), "reuse is better than a node without pod CIDR");
    assert_eq!(pool.allocate(now), None);
    pool.release(&net("10.0.0.0/24"), now);
    assert_eq!(pool.allocate(now + REUSE_DELAY), Some(net("10.0.0.0/24")));
}

#[test]
fn ranges_of_other_lengths_are_skipped() {
    let (mut pool, now) = (pool("10.0.0.0/21", 24), Instant::now());
    pool.occupy(&net("10.0.2.0/23"));
    pool.occupy(&net("10.0.4.128/25"));
    pool.occupy(&net("192.168.0.0/24"));
    assert_eq!(pool.used(), 3);
    let allocated: Vec<_> = std::iter::from_fn(|| pool.allocate(now)).collect();
    let left = ["10.0.5.0/24", "10.0.6.0/24", "10.0.7.0/24", "10.0.0.0/24", "10.0.1.0/24"];
    assert_eq!(allocated, left.map(net));
}

#[test]
fn range_of_two_nodes_is_free_after_both_released_it() {
    let (mut pool, now) = (pool("10.0.0.0/24", 24), Instant::now());
    pool.occupy(&net("10.0.0.0/24"));
    pool.occupy(&net("10.0.0.0/24"));
    pool.release(&net("10.0.0.0/24"), now);
    assert_eq!(pool.allocate(now), None);
    pool.release(&net("10.0.0.0/24"), now);
    assert!(pool.allocate(now).is_some());
}

#[test]
fn large_ipv6_pool_is_supported() {
    let (mut pool, now) = (pool("fd00::/16", 64), Instant::now());
    assert_eq!(pool.capacity(), 1 << 48);
    pool.occupy(&net("fd00::/20"));
    assert_eq!(pool.allocate(now), Some(net("fd00:1000::/64")));
    assert_eq!(pool.allocate(now), Some(net("fd00:1000:0:1::/64")));
}

#[test]
fn invalid_masks_are_rejected_with_both_values() {
    let refused = |cluster: &str, mask| Pool::new(net(cluster), mask, REUSE_DELAY).unwrap_err().to_string();
    assert_eq!(
        refused("10.0.0.0/24", 16),
        "node mask /16 is shorter than cluster CIDR 10.0.0.0/24: no node range fits"
    );
    assert_eq!(
        refused("10.0.0.0/24", 31),
        "node mask /31 leaves no pod addresses in 10.0.0.0/24: at most /30 is allowed"
    );
    assert_eq!(
        refused("10.0.0.1/24", 26),
        "cluster CIDR 10.0.0.1/24 has bits set after its prefix: did you mean 10.0.0.0/24?"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Allocate,
    /// One of the ranges in use.
    Release(usize),
    /// Offset within the cluster CIDR, and a prefix length.
    Occupy(u32, u8),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Allocate),
        2 => (0..64_usize).prop_map(Step::Release),
        1 => (0..1_u32 << 12, 21..=28_u8).prop_map(|(address, length)| Step::Occupy(address, length)),
        1 => (0..90_u64).prop_map(Step::Wait),
    ]
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

proptest! {
    #[test]
    fn allocated_ranges_never_overlap_and_all_free_ranges_are_found(
        steps in proptest::collection::vec(step(), 0..200),
        seed in 0..16_u128,
    ) {
        let mut pool = pool("10.0.0.0/20", 24);
        pool.next = seed;
        let mut now = Instant::now();
        let mut in_use: Vec<IpNet> = Vec::new();
        let all: Vec<IpNet> = net("10.0.0.0/20").subnets(24).unwrap().collect();
        for step in steps {
            match step {
                Step::Allocate => match pool.allocate(now) {
                    Some(allocated) => {
                        prop_assert!(all.contains(&allocated));
                        prop_assert!(!in_use.iter().any(|other| overlap(&allocated, other)), "{allocated} of {in_use:?}");
                        in_use.push(allocated);
                    }
                    None => prop_assert!(all.iter().all(|one| in_use.iter().any(|other| overlap(one, other)))),
                },
                Step::Release(which) if !in_use.is_empty() => {
                    let range = in_use.swap_remove(which % in_use.len());
                    pool.release(&range, now);
                }
                Step::Release(_) => {}
                Step::Occupy(address, length) => {
                    let base = Ipv4Addr::from_bits(u32::from_be_bytes([10, 0, 0, 0]) + address);
                    let range = IpNet::new(base.into(), length).unwrap().trunc();
                    pool.occupy(&range);
                    in_use.push(range);
                }
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
            }
            let used = all.iter().filter(|one| in_use.iter().any(|other| overlap(one, other))).count();
            prop_assert_eq!(pool.used(), used as u128);
        }
        for range in in_use {
            pool.release(&range, now);
        }
        prop_assert_eq!(pool.used(), 0);
    }
}
