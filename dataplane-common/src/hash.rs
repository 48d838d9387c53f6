//! Hashes that select a backend. User space and datapath must agree on them, and so must all nodes.

use crate::abi::{Addr, FlowKey};

/// Hash of a tuple: the same on every node, so that nodes with the same Maglev table select the
/// same backend.
#[inline(always)]
pub const fn tuple(key: &FlowKey) -> u32 {
    let ports = (key.src_port.wire() as u32) << 16 | key.dst_port.wire() as u32;
    finish(mix(mix(mix(SEED ^ key.protocol as u32, ports), fold(key.src)), fold(key.dst)))
}

/// Hash of a client's address alone, for session affinity.
#[inline(always)]
pub const fn client(addr: Addr) -> u32 {
    finish(SEED ^ fold(addr))
}

/// Scales a hash or a random number to `0..count` without a division (multiply-shift); 0 if `count`
/// is 0.
#[inline(always)]
pub const fn scale(hash: u32, count: u32) -> u32 {
    ((hash as u64 * count as u64) >> 32) as u32
}

const SEED: u32 = 0x9e37_79b9;

#[inline(always)]
const fn fold(addr: Addr) -> u32 {
    let [a, b, c, d] = addr.words();
    mix(mix(mix(a, b), c), d)
}

/// One round of Murmur3 (public domain, A. Appleby).
#[inline(always)]
const fn mix(state: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (state ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

/// Murmur3's finaliser: every input bit reaches every output bit.
#[inline(always)]
pub const fn finish(state: u32) -> u32 {
    let state = (state ^ state >> 16).wrapping_mul(0x85eb_ca6b);
    let state = (state ^ state >> 13).wrapping_mul(0xc2b2_ae35);
    state ^ state >> 16
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::abi::Port;

    proptest! {
        #[test]
        fn scaled_hash_is_below_the_count(hash in any::<u32>(), count in 1_u32..) {
            prop_assert!(scale(hash, count) < count);
        }
    }

    #[test]
    fn source_ports_spread_evenly_over_backends() {
        let mut chosen = [0_u32; 8];
        for port in 32_768..60_768 {
            let key = FlowKey::new(
                6,
                Ipv4Addr::new(10, 1, 0, 2).into(),
                Port::new(port),
                Ipv4Addr::new(10, 96, 0, 1).into(),
                Port::new(80),
            );
            chosen[scale(tuple(&key), 8) as usize] += 1;
        }
        assert!(chosen.iter().all(|count| (3_150..3_850).contains(count)), "{chosen:?}");
    }
}
