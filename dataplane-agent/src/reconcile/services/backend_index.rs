//! Index of backends by ID and by key. Clusters may have a hundred thousand, so each is stored
//! once.

use std::hash::{BuildHasher as _, RandomState};

use hashbrown::HashTable;

use super::backends::{Backend, BackendKey};

/// Backends by ID and by key.
#[derive(Debug, Default)]
pub(super) struct BackendIndex {
    by_id: Vec<Option<Backend>>,
    /// IDs by the hash of the key.
    by_key: HashTable<u32>,
    hasher: RandomState,
}

impl BackendIndex {
    pub(super) fn get(&self, id: u32) -> Option<&Backend> {
        self.by_id.get(id as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Backend> {
        self.by_id.get_mut(id as usize)?.as_mut()
    }

    /// The ID of a backend.
    pub(super) fn find(&self, key: &BackendKey) -> Option<u32> {
        let is = |id: &u32| self.get(*id).is_some_and(|backend| backend.key == *key);
        self.by_key.find(self.hasher.hash_one(key), is).copied()
    }

    /// Adds a backend under a free ID. IDs are small: they index a table.
    pub(super) fn insert(&mut self, id: u32, backend: Backend) {
        let hash = self.hasher.hash_one(backend.key);
        if self.by_id.len() <= id as usize {
            self.by_id.resize_with(id as usize + 1, || None);
        }
        self.by_id[id as usize] = Some(backend);
        let (by_id, hasher) = (&self.by_id, &self.hasher);
        let rehash =
            |id: &u32| by_id[*id as usize].as_ref().map_or(0, |backend| hasher.hash_one(backend.key));
        self.by_key.insert_unique(hash, id, rehash);
    }

    /// Removes the backend with this ID, and returns it.
    pub(super) fn remove(&mut self, id: u32) -> Option<Backend> {
        let backend = self.by_id.get_mut(id as usize)?.take()?;
        let hash = self.hasher.hash_one(backend.key);
        if let Ok(entry) = self.by_key.find_entry(hash, |other| *other == id) {
            entry.remove();
        }
        Some(backend)
    }

    /// In the order of IDs.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Backend)> {
        (0..).zip(&self.by_id).filter_map(|(id, backend)| Some((id, backend.as_ref()?)))
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::IpAddr};

    use dataplane_common::abi::Port;
    use proptest::prelude::*;

    use super::*;

    fn key(n: u8) -> BackendKey {
        BackendKey { service: 1, addr: IpAddr::from([10, 0, 0, n]).into(), port: Port::new(80), protocol: 6 }
    }

    proptest! {
        /// Both indexes agree after any sequence of changes.
        #[test]
        fn lookups_by_id_and_key_agree(changes in proptest::collection::vec((0_u32..12, 0_u8..12), 0..200)) {
            let (mut index, mut model) = (BackendIndex::default(), BTreeMap::new());
            for (id, n) in changes {
                if model.remove(&id).is_some() {
                    prop_assert!(index.remove(id).is_some());
                } else if !model.values().any(|other| *other == n) {
                    model.insert(id, n);
                    index.insert(id, Backend { key: key(n), generation: 1, ranges: 0 });
                }
                prop_assert_eq!(index.len(), model.len());
                for (id, n) in &model {
                    prop_assert_eq!(index.find(&key(*n)), Some(*id));
                }
                let listed: Vec<_> = index.iter().map(|(id, backend)| (id, backend.key)).collect();
                let expected: Vec<_> = model.iter().map(|(id, n)| (*id, key(*n))).collect();
                prop_assert_eq!(listed, expected);
            }
        }
    }
}
