//! Objects and their history: every write is one revision, kept until it is compacted. Knows no HTTP, and judges nothing.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use serde_json::{Value, json};

use super::{failure::Failure, resources::Resource};

/// The name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) resource: &'static Resource,
    /// Empty where there are none.
    pub(super) namespace: String,
    pub(super) name: String,
}

/// A write.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) key: Key,
    pub(super) before: Option<Arc<Value>>,
    /// `None`: deleted.
    pub(super) after: Option<Arc<Value>>,
}

/// What etcd is to the real server.
#[derive(Debug)]
pub(super) struct Store {
    revision: u64,
    compacted: u64,
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Change>,
}

impl Store {
    pub(super) fn new() -> Self {
        // a client that confuses "0" (any) with "the first" finds out
        Self { revision: 100, compacted: 100, objects: BTreeMap::new(), history: VecDeque::new() }
    }

    pub(super) const fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&self, key: &Key) -> Option<&Arc<Value>> {
        self.objects.get(key)
    }

    /// Objects of a kind as they are.
    pub(super) fn current(&self, resource: &'static Resource) -> impl Iterator<Item = &Value> {
        self.range(resource).map(|(_, object)| &**object)
    }

    fn range(&self, resource: &'static Resource) -> impl Iterator<Item = (&Key, &Arc<Value>)> {
        let first = Key { resource, namespace: String::new(), name: String::new() };
        self.objects.range(first..).take_while(move |(key, _)| key.resource == resource)
    }

    /// Writes, and stamps the new revision into the object.
    pub(super) fn put(&mut self, key: &Key, mut object: Value) -> Arc<Value> {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let object = Arc::new(object);
        let before = self.objects.insert(key.clone(), Arc::clone(&object));
        let after = Some(Arc::clone(&object));
        self.history.push_back(Change { revision: self.revision, key: key.clone(), before, after });
        object
    }

    /// The object as it was, with the revision of its end.
    pub(super) fn delete(&mut self, key: &Key) -> Option<Arc<Value>> {
        let before = self.objects.remove(key)?;
        self.revision += 1;
        let mut last = (*before).clone();
        last["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let change = Change { revision: self.revision, key: key.clone(), before: Some(before), after: None };
        self.history.push_back(change);
        Some(Arc::new(last))
    }

    /// Objects of a kind as they were at a revision; by namespace and name.
    ///
    /// # Errors
    ///
    /// A revision that is compacted, or not yet written.
    pub(super) fn list(
        &self,
        resource: &'static Resource,
        revision: u64,
    ) -> Result<BTreeMap<&Key, &Arc<Value>>, Failure> {
        self.check(revision)?;
        let mut objects: BTreeMap<&Key, &Arc<Value>> = self.range(resource).collect();
        for change in self.history.iter().rev().take_while(|change| change.revision > revision) {
            if change.key.resource != resource {
                continue;
            }
            match &change.before {
                Some(before) => objects.insert(&change.key, before),
                None => objects.remove(&change.key),
            };
        }
        Ok(objects)
    }

    /// Writes after a revision, oldest first.
    ///
    /// # Errors
    ///
    /// As [`Self::list`].
    pub(super) fn since(&self, revision: u64) -> Result<impl Iterator<Item = &Change>, Failure> {
        self.check(revision)?;
        let known = self.history.partition_point(|change| change.revision <= revision);
        Ok(self.history.iter().skip(known))
    }

    /// Forgets how objects came to be what they are.
    pub(super) fn compact(&mut self) {
        self.history.clear();
        self.compacted = self.revision;
    }

    /// Jumps ahead, as writes to kinds nobody looks at do.
    pub(super) fn advance(&mut self, revisions: u64) {
        self.revision += revisions;
    }

    fn check(&self, revision: u64) -> Result<(), Failure> {
        if revision < self.compacted {
            return Err(Failure::expired(revision, self.compacted));
        }
        if revision > self.revision {
            return Err(Failure::too_large(revision, self.revision));
        }
        Ok(())
    }
}
