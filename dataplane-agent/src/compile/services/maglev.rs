//! Maglev tables of backends: the length and the content.

use dataplane_common::{hash, maglev};

use super::Backend;

/// Slots of a Maglev table per backend: shares then differ by about one percent.
const MAGLEV_SLOTS_PER_BACKEND: usize = 100;
/// Prime lengths of Maglev tables. They double, because every change of the length moves most
/// connections.
const MAGLEV_LENGTHS: [usize; 10] = [251, 509, 1_021, 2_039, 4_093, 8_191, 16_381, 32_749, 65_521, 131_071];
/// Maximum length for smooth shares alone.
const MAGLEV_SLOTS_SOFT_MAX: usize = 16_381;

/// Builds a Maglev table: for each slot an index into `backends`.
pub(super) fn maglev_table(backends: &[Backend]) -> Vec<u32> {
    if backends.is_empty() {
        return Vec::new();
    }
    let names: Vec<u64> = backends.iter().map(maglev_hash).collect();
    let mut table = vec![0; maglev_length(backends.len())];
    maglev::fill(&mut table, &names, &mut vec![0; backends.len()]);
    table
}

pub(super) fn maglev_length(backends: usize) -> usize {
    let length = (backends * MAGLEV_SLOTS_PER_BACKEND).min(MAGLEV_SLOTS_SOFT_MAX).max(backends);
    let largest = MAGLEV_LENGTHS[MAGLEV_LENGTHS.len() - 1];
    MAGLEV_LENGTHS.into_iter().find(|size| *size >= length).unwrap_or(largest)
}

/// A hash of address and port, equal on every node and in every release.
fn maglev_hash(backend: &Backend) -> u64 {
    let [a, b, c, d] = backend.addr.words();
    let half = |seed: u32| {
        let words = [a, b, c, d, u32::from(backend.port.wire())];
        words.into_iter().fold(seed, |state, word| hash::finish(state.rotate_left(5) ^ word))
    };
    u64::from(half(0x5bd1_e995)) << 32 | u64::from(half(0x1b87_3593))
}
