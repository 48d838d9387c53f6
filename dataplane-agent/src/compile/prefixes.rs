//! Networks as keys of longest-prefix-match tables.
//!
//! Both families share a table, and IPv4 addresses are IPv4-mapped there. An IPv6 network that
//! contains `::ffff:0:0/96` is split, so that no IPv4 address matches it.

use std::net::{IpAddr, Ipv6Addr};

use dataplane_common::abi::Addr;
use ipnet::{IpNet, Ipv6Net};

const BITS: u8 = 128;
/// All IPv4-mapped addresses: `::ffff:0:0/96`.
const MAPPED: u128 = 0xffff << 32;
const MAPPED_BITS: u8 = Addr::V4_PREFIX_BITS as u8;
/// Networks of at most this length are split down to `::/16`, not to `::ffff:0:0/96`: that saves 80
/// rows, and no other address in `::/16` is ever a client or leaves a node (RFC 4291 §2.5).
const COARSE_BITS: u8 = 16;

/// Address and length of the prefixes that match exactly the network's own family.
pub fn prefixes(network: &IpNet) -> Vec<(Addr, u32)> {
    match network {
        IpNet::V4(v4) => {
            vec![(v4.network().into(), Addr::V4_PREFIX_BITS + u32::from(v4.prefix_len()))]
        }
        IpNet::V6(v6) if contains_mapped(v6) => {
            let last = if v6.prefix_len() < COARSE_BITS { COARSE_BITS } else { MAPPED_BITS };
            // at each bit, the half without them
            (v6.prefix_len() + 1..=last).map(|bits| (other_half(bits), bits.into())).collect()
        }
        // no packet of IPv6 has such an address
        IpNet::V6(v6) if is_mapped(v6) => Vec::new(),
        IpNet::V6(v6) => vec![(v6.network().into(), v6.prefix_len().into())],
    }
}

fn contains_mapped(network: &Ipv6Net) -> bool {
    network.prefix_len() < MAPPED_BITS && network.contains(&Ipv6Addr::from_bits(MAPPED))
}

fn is_mapped(network: &Ipv6Net) -> bool {
    network.prefix_len() >= MAPPED_BITS && network.network().to_ipv4_mapped().is_some()
}

/// The prefix of this length that differs from the mapped addresses in its last bit.
fn other_half(bits: u8) -> Addr {
    let last = 1 << (BITS - bits);
    IpAddr::from(Ipv6Addr::from_bits((MAPPED ^ last) & !(last - 1))).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of a lookup in a table with these prefixes.
    fn matches(network: &str, address: &str) -> bool {
        let bits = |addr: Addr| match addr.to_ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let address = bits(address.parse::<IpAddr>().unwrap().into());
        let is_in = |(addr, length): &(Addr, u32)| (address ^ bits(*addr)).leading_zeros() >= *length;
        prefixes(&network.parse().unwrap()).iter().any(is_in)
    }

    #[test]
    fn network_matches_addresses_of_its_family_only() {
        for (network, inside, outside) in [
            ("0.0.0.0/0", vec!["192.0.2.1", "0.0.0.1"], vec!["2001:db8::1", "fd00::1", "::1"]),
            ("10.0.0.0/8", vec!["10.1.2.3"], vec!["11.0.0.1", "2001:db8::1"]),
            (
                "::/0",
                vec!["2001:db8::1", "fd00::1", "fe80::1", "64:ff9b::a00:1", "1::"],
                vec!["10.1.2.3", "192.0.2.1", "0.0.0.0", "255.255.255.255"],
            ),
            ("::/1", vec!["2001:db8::1", "64:ff9b::a00:1"], vec!["10.1.2.3", "fd00::1"]),
            ("::/16", vec!["::1", "::fffe:0:1", "::1:0:0:1", "0:1::"], vec!["10.1.2.3", "1::"]),
            ("::/64", vec!["::1", "::8000:0:0:1", "::fffe:ffff:ffff"], vec!["10.1.2.3", "0:0:0:1::"]),
            ("::fffe:0:0/95", vec!["::fffe:0:1"], vec!["10.1.2.3", "255.255.255.255", "::1"]),
            ("::ffff:0:0/96", vec![], vec!["10.1.2.3"]),
            ("::ffff:10.0.0.0/104", vec![], vec!["10.1.2.3"]),
            ("0:1::/64", vec!["0:1::1"], vec!["10.1.2.3", "::1"]),
            ("2000::/3", vec!["2001:db8::1"], vec!["10.1.2.3", "fd00::1"]),
            ("2001:db8::/32", vec!["2001:db8::1"], vec!["2001:db9::1", "10.1.2.3"]),
        ] {
            for address in inside {
                assert!(matches(network, address), "{network} matches {address}");
            }
            for address in outside {
                assert!(!matches(network, address), "{network} does not match {address}");
            }
        }
    }
}
