//! Who wants what: several may want the same key, one of them gets it.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

/// What is wanted of each key, by claimant; the smallest claimant wins.
#[derive(Debug)]
pub(super) struct Claims<K, C, V> {
    keys: HashMap<K, BTreeMap<C, V>>,
    claimants: BTreeMap<C, Vec<K>>,
}

impl<K, C, V> Default for Claims<K, C, V> {
    fn default() -> Self {
        Self { keys: HashMap::new(), claimants: BTreeMap::new() }
    }
}

impl<K: Copy + Eq + Hash, C: Clone + Ord, V: PartialEq> Claims<K, C, V> {
    /// From now on `claimant` wants exactly `entries`. Returns the keys for which somebody else or something else wins.
    pub(super) fn set(&mut self, claimant: &C, entries: impl IntoIterator<Item = (K, V)>) -> Vec<K> {
        let mut before = self.claimants.remove(claimant).unwrap_or_default();
        let mut after = Vec::new();
        let mut changed = Vec::new();
        for (key, value) in entries {
            before.retain(|old| *old != key);
            after.push(key);
            let claims = self.keys.entry(key).or_default();
            let won = claims.first_key_value().is_none_or(|(winner, _)| claimant <= winner);
            let same = claims.get(claimant) == Some(&value);
            claims.insert(claimant.clone(), value);
            if won && !same {
                changed.push(key);
            }
        }
        for key in before {
            let Some(claims) = self.keys.get_mut(&key) else { continue };
            if claims.first_key_value().is_some_and(|(winner, _)| winner == claimant) {
                changed.push(key);
            }
            claims.remove(claimant);
            if claims.is_empty() {
                self.keys.remove(&key);
            }
        }
        if !after.is_empty() {
            self.claimants.insert(claimant.clone(), after);
        }
        changed
    }

    /// What is wanted of the key, and by whom.
    pub(super) fn winner(&self, key: &K) -> Option<(&C, &V)> {
        self.keys.get(key)?.first_key_value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_claimant_wins_until_it_goes() {
        let mut claims = Claims::default();
        assert_eq!(claims.set(&2, [('a', "two")]), ['a']);
        assert_eq!(claims.set(&3, [('a', "three"), ('b', "three")]), ['b']);
        assert_eq!(claims.set(&2, [('a', "two")]), [] as [char; 0], "unchanged");
        assert_eq!(claims.winner(&'a'), Some((&2, &"two")));
        assert_eq!(claims.set(&2, []), ['a']);
        assert_eq!(claims.winner(&'a'), Some((&3, &"three")));
        let mut gone = claims.set(&3, []);
        gone.sort_unstable();
        assert_eq!(gone, ['a', 'b']);
        assert_eq!(claims.winner(&'a'), None);
    }
}
