//! Maglev tables (Eisenbud et al., NSDI 2016, §3.4): a backend per entry; few entries change when a
//! backend is removed.
//!
//! The datapath needs no code for it: a service whose flags say
//! [`HASH`](crate::abi::ServiceFlags::HASH) selects the slot by hash, and user space fills the
//! range with this table.

/// Fills `table` with indices into `names`, one hash per backend; all entries stay 0 if `names` is
/// empty.
///
/// `names` are hashes of the backends' addresses and ports, so that the table does not depend on
/// the order of backends. The length of `table` must be prime, so that each backend's sequence
/// covers every entry; `scratch` needs one element per backend.
pub fn fill(table: &mut [u32], names: &[u64], scratch: &mut [u32]) {
    const FREE: u32 = u32::MAX;
    let size = table.len() as u64;
    if names.is_empty() || size < 2 {
        table.fill(0);
        return;
    }
    table.fill(FREE);
    scratch.fill(0);
    let mut left = table.len();
    while left > 0 {
        for (backend, (name, tried)) in names.iter().zip(scratch.iter_mut()).enumerate() {
            let offset = (name >> 32) % size;
            let skip = (name & 0xffff_ffff) % (size - 1) + 1;
            let free = loop {
                let entry = (offset + u64::from(*tried) * skip) % size;
                *tried += 1;
                if table[entry as usize] == FREE {
                    break entry as usize;
                }
            };
            table[free] = backend as u32;
            left -= 1;
            if left == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 1021;

    fn table(names: &[u64]) -> Vec<u64> {
        let mut table = vec![0; SIZE];
        fill(&mut table, names, &mut vec![0; names.len()]);
        table.iter().map(|index| names[*index as usize]).collect()
    }

    proptest! {
        #[test]
        fn shares_of_backends_differ_by_at_most_one(names in proptest::collection::hash_set(any::<u64>(), 1..50)) {
            let names: Vec<_> = names.into_iter().collect();
            let table = table(&names);
            let share = |name| table.iter().filter(|entry| *entry == name).count();
            let (least, most) = (names.iter().map(share).min().unwrap(), names.iter().map(share).max().unwrap());
            prop_assert!(most - least <= 1);
        }

        #[test]
        fn removing_a_backend_moves_few_other_entries(names in proptest::collection::hash_set(any::<u64>(), 3..30)) {
            let names: Vec<_> = names.into_iter().collect();
            let (before, after) = (table(&names), table(&names[1..]));
            let moved = before.iter().zip(&after).filter(|(old, new)| **old != names[0] && old != new).count();
            prop_assert!(moved * 4 < SIZE, "{moved} of {SIZE} moved");
        }
    }

    #[test]
    fn table_without_backends_is_zero() {
        let mut entries = [7; 5];
        fill(&mut entries, &[], &mut []);
        assert_eq!(entries, [0; 5]);
    }
}
