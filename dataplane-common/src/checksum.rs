//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! The checksum field holds the complement of the one's-complement sum of all 16-bit words.
//! Replacing a word `old` by `new` changes the sum by `new - old`, and in one's complement `-old`
//! is `!old`. So a change is a sum of words: it can be accumulated over any number of replacements
//! and folded into the field once. Words are used in memory order: the sum does not depend on byte
//! order (RFC 1071 §2.B).

/// The effect of a set of replacements on a checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Change {
    // up to 2^16 words of 32 bits fit without overflow
    sum: u64,
}

impl Change {
    /// No change.
    pub const NONE: Self = Self { sum: 0 };

    /// Adds the replacement of a 16-bit word.
    #[inline(always)]
    pub const fn u16(self, old: u16, new: u16) -> Self {
        Self { sum: self.sum + (!old) as u64 + new as u64 }
    }

    /// Adds the replacement of a 32-bit word at an even offset.
    #[inline(always)]
    pub const fn u32(self, old: u32, new: u32) -> Self {
        Self { sum: self.sum + (!old) as u64 + new as u64 }
    }

    /// Adds the replacement of four 32-bit words at an even offset.
    #[inline(always)]
    pub const fn words(self, old: [u32; 4], new: [u32; 4]) -> Self {
        self.u32(old[0], new[0]).u32(old[1], new[1]).u32(old[2], new[2]).u32(old[3], new[3])
    }

    /// The change as the one's-complement difference `bpf_l4_csum_replace` takes with `from = 0`:
    /// 32 bits, not folded further.
    #[inline(always)]
    pub const fn difference(self) -> u32 {
        let sum = (self.sum & 0xffff_ffff) + (self.sum >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }

    /// The new value of a checksum field whose value was `old` (RFC 1624, eqn. 3).
    #[inline(always)]
    pub const fn apply(self, old: u16) -> u16 {
        !fold((!old) as u64 + self.difference() as u64)
    }
}

/// Folds a one's-complement sum to 16 bits.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The one's-complement sum of `bytes`, an odd last byte padded with zero. Sums can be added before
/// [`fold`].
pub fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |byte| u64::from(u16::from_ne_bytes([*byte, 0])));
    words.iter().map(|word| u64::from(u16::from_ne_bytes(*word))).sum::<u64>() + last
}

/// As [`sum`], of 32-bit words.
#[inline(always)]
pub const fn sum_of_words<const WORDS: usize>(words: &[u32; WORDS]) -> u64 {
    let (mut sum, mut index) = (0, 0);
    while index < WORDS {
        sum += words[index] as u64;
        index += 1;
    }
    sum
}

/// The checksum of `bytes`, in which the checksum field itself is zero. In memory order: store it
/// unchanged.
pub fn of(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rfc_1071_example() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    /// Equal, where 0x0000 and 0xffff are the two zeros of one's complement.
    fn same(left: u16, right: u16) -> bool {
        left == right || (left == 0 && right == 0xffff) || (left == 0xffff && right == 0)
    }

    proptest! {
        #[test]
        fn update_equals_full_recomputation(
            mut bytes in proptest::collection::vec(any::<u8>(), 40..200),
            new in any::<[u32; 4]>(), port in any::<u16>(),
        ) {
            let old_checksum = of(&bytes);
            let mut old = [0; 4];
            for (word, chunk) in old.iter_mut().zip(bytes[8..24].chunks_exact(4)) {
                *word = u32::from_ne_bytes(chunk.try_into().unwrap());
            }
            let old_port = u16::from_ne_bytes([bytes[30], bytes[31]]);
            for (word, chunk) in new.iter().zip(bytes[8..24].chunks_exact_mut(4)) {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
            bytes[30..32].copy_from_slice(&port.to_ne_bytes());
            let change = Change::NONE.words(old, new).u16(old_port, port);
            prop_assert!(same(change.apply(old_checksum), of(&bytes)));
        }

        #[test]
        fn change_and_its_inverse_cancel(old in any::<u32>(), new in any::<u32>(), field in any::<u16>()) {
            let there = Change::NONE.u32(old, new).apply(field);
            prop_assert!(same(Change::NONE.u32(new, old).apply(there), field));
        }

        #[test]
        fn checksummed_bytes_verify(mut bytes in proptest::collection::vec(any::<u8>(), 2..100)) {
            bytes[0] = 0;
            bytes[1] = 0;
            let checksum = of(&bytes);
            bytes[0..2].copy_from_slice(&checksum.to_ne_bytes());
            prop_assert_eq!(fold(sum(&bytes)), 0xffff);
        }
    }
}
