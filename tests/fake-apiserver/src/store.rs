//! Objects and their history: every write is a revision, kept until compaction. Does not validate.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use serde_json::{Value, json};

use super::{failure::Failure, resources::Resource};

/// Identifies an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) resource: &'static Resource,
    /// Empty for cluster-scoped resources.
    pub(super) namespace: String,
    pub(super) name: String,
}

/// A write in the history.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) revision: u64,
    pub(super) key: Key,
    pub(super) before: Option<Arc<Value>>,
    /// `None`: deleted.
    pub(super) after: Option<Arc<Value>>,
}

/// The counterpart of etcd.
#[derive(Debug)]
pub(super) struct Store {
    revision: u64,
    compacted: u64,
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Change>,
}

impl Store {
    pub(super) fn new() -> Self {
        // not 0: a test fails if a client takes revision "0" (any) for the first
        Self { revision: 100, compacted: 100, objects: BTreeMap::new(), history: VecDeque::new() }
    }

    pub(super) const fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&self, key: &Key) -> Option<&Arc<Value>> {
        self.objects.get(key)
    }

    /// Returns the current objects of a resource.
    pub(super) fn current(&self, resource: &'static Resource) -> impl Iterator<Item = &Value> {
        self.range(resource).map(|(_, object)| &**object)
    }

    fn range(&self, resource: &'static Resource) -> impl Iterator<Item = (&Key, &Arc<Value>)> {
        let first = Key { resource, namespace: String::new(), name: String::new() };
        self.objects.range(first..).take_while(move |(key, _)| key.resource == resource)
    }

    /// Writes an object and sets its `resourceVersion` to the new revision.
    pub(super) fn put(&mut self, key: &Key, mut object: Value) -> Arc<Value> {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let object = Arc::new(object);
        let before = self.objects.insert(key.clone(), Arc::clone(&object));
        let after = Some(Arc::clone(&object));
        self.history.push_back(Change { revision: self.revision, key: key.clone(), before, after });
        object
    }

    /// Deletes an object. Returns its last state with the revision of the deletion.
    pub(super) fn delete(&mut self, key: &Key) -> Option<Arc<Value>> {
        let before = self.objects.remove(key)?;
        self.revision += 1;
        let mut last = (*before).clone();
        last["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let change = Change { revision: self.revision, key: key.clone(), before: Some(before), after: None };
        self.history.push_back(change);
        Some(Arc::new(last))
    }

    /// Returns the objects of a resource at a revision, sorted by namespace and name.
    ///
    /// # Errors
    ///
    /// The revision is compacted or does not exist yet.
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

    /// Returns the writes after a revision, oldest first.
    ///
    /// # Errors
    ///
    /// As for [`Self::list`].
    pub(super) fn since(&self, revision: u64) -> Result<impl Iterator<Item = &Change>, Failure> {
        self.check(revision)?;
        let known = self.history.partition_point(|change| change.revision <= revision);
        Ok(self.history.iter().skip(known))
    }

    /// Deletes the history.
    pub(super) fn compact(&mut self) {
        self.history.clear();
        self.compacted = self.revision;
    }

    /// Advances the revision, as writes to other resources do.
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
