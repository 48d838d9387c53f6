//! The smallest prefix that contains all cluster IPs seen so far.

use dataplane_common::abi::{Addr, ClusterRange};

/// The smallest prefix that contains `range` and `addr`.
pub(super) fn widened(range: Option<ClusterRange>, addr: Addr) -> ClusterRange {
    let bits = |addr: Addr| addr.words().map(u32::from_be);
    let addr = bits(addr);
    let (first, mask) = range.map_or((addr, [u32::MAX; 4]), |range| (bits(range.addr), bits(range.mask)));
    let mut wide = [0; 4];
    for word in 0..4 {
        let same = ((addr[word] ^ first[word]) & mask[word]).leading_zeros();
        wide[word] = mask[word] & u32::MAX.checked_shr(same).map_or(u32::MAX, |rest| !rest);
        // the bits after the first difference are not part of the prefix
        if same < u32::BITS {
            break;
        }
    }
    let words = |bits: [u32; 4]| Addr::v6_words(bits.map(u32::to_be));
    let start: [u32; 4] = std::array::from_fn(|word| addr[word] & wide[word]);
    ClusterRange { addr: words(start), mask: words(wide) }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn range(ips: &[&str]) -> ClusterRange {
        let addrs = ips.iter().map(|ip| Addr::from(ip.parse::<IpAddr>().unwrap()));
        addrs.fold(None, |range, addr| Some(widened(range, addr))).unwrap()
    }

    fn has(range: &ClusterRange, ip: &str) -> bool {
        range.contains(&Addr::from(ip.parse::<IpAddr>().unwrap()))
    }

    #[test]
    fn range_contains_its_addresses_and_little_else() {
        let one = range(&["10.96.0.1"]);
        assert!(has(&one, "10.96.0.1") && !has(&one, "10.96.0.2") && !has(&one, "::10.96.0.1"));
        let some = range(&["10.96.0.1", "10.96.0.10", "10.103.255.254", "10.96.0.10"]);
        for ip in ["10.96.0.1", "10.96.0.10", "10.103.255.254", "10.100.1.1"] {
            assert!(has(&some, ip), "{ip}");
        }
        for ip in ["10.104.0.0", "10.95.255.255", "11.96.0.1", "fd00::1"] {
            assert!(!has(&some, ip), "{ip}");
        }
        let v6 = range(&["fd00:96::1", "fd00:96::ffff:1", "fd00:96::8000:0:0:0"]);
        assert!(has(&v6, "fd00:96::2:1") && !has(&v6, "fd00:97::1") && !has(&v6, "10.96.0.1"));
    }

    #[test]
    fn empty_range_contains_nothing() {
        for ip in ["0.0.0.0", "10.96.0.1", "::", "::1", "fd00::1"] {
            assert!(!has(&ClusterRange::EMPTY, ip), "{ip}");
        }
    }
}
