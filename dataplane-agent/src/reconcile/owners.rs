//! Keys that several owners may want: each key has one effective owner.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

/// The desired value of each key, by owner; the smallest owner takes effect.
#[derive(Debug)]
pub(super) struct KeyOwners<K, O, V> {
    keys: HashMap<K, BTreeMap<O, V>>,
    keys_of: BTreeMap<O, Vec<K>>,
}

impl<K, O, V> Default for KeyOwners<K, O, V> {
    fn default() -> Self {
        Self { keys: HashMap::new(), keys_of: BTreeMap::new() }
    }
}

impl<K: Copy + Eq + Hash, O: Clone + Ord, V: PartialEq> KeyOwners<K, O, V> {
    /// Replaces the entries of an owner. Returns the keys whose effective value changed.
    pub(super) fn set(&mut self, owner: &O, entries: impl IntoIterator<Item = (K, V)>) -> Vec<K> {
        let mut before = self.keys_of.remove(owner).unwrap_or_default();
        let mut after = Vec::new();
        let mut changed = Vec::new();
        for (key, value) in entries {
            before.retain(|old| *old != key);
            after.push(key);
            let owners = self.keys.entry(key).or_default();
            let is_effective = owners.first_key_value().is_none_or(|(effective, _)| owner <= effective);
            let same = owners.get(owner) == Some(&value);
            owners.insert(owner.clone(), value);
            if is_effective && !same {
                changed.push(key);
            }
        }
        for key in before {
            let Some(owners) = self.keys.get_mut(&key) else { continue };
            if owners.first_key_value().is_some_and(|(effective, _)| effective == owner) {
                changed.push(key);
            }
            owners.remove(owner);
            if owners.is_empty() {
                self.keys.remove(&key);
            }
        }
        if !after.is_empty() {
            self.keys_of.insert(owner.clone(), after);
        }
        changed
    }

    /// The effective owner of a key and its value.
    pub(super) fn effective(&self, key: &K) -> Option<(&O, &V)> {
        self.keys.get(key)?.first_key_value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_owner_is_effective_until_removed() {
        let mut owners = KeyOwners::default();
        assert_eq!(owners.set(&2, [('a', "two")]), ['a']);
        assert_eq!(owners.set(&3, [('a', "three"), ('b', "three")]), ['b']);
        assert_eq!(owners.set(&2, [('a', "two")]), [] as [char; 0], "unchanged");
        assert_eq!(owners.effective(&'a'), Some((&2, &"two")));
        assert_eq!(owners.set(&2, []), ['a']);
        assert_eq!(owners.effective(&'a'), Some((&3, &"three")));
        let mut changed = owners.set(&3, []);
        changed.sort_unstable();
        assert_eq!(changed, ['a', 'b']);
        assert_eq!(owners.effective(&'a'), None);
    }
}
