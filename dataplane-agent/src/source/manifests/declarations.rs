//! Which file declares which object, and which declaration applies.
//!
//! If several files (or places in one file) declare the same object, the first in the order of file
//! names applies; the others are problems. While the first is invalid, its last valid version
//! stays. The result depends only on the files and on that last valid version. The work is
//! proportional to the objects of changed files.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ffi::{OsStr, OsString},
    sync::Arc,
};

use super::parse::Declaration;
use crate::{
    source::Problem,
    state::{Object, ObjectKey, SourceEvent},
};

/// A file and the position in it.
type Position = (OsString, usize);

/// All declarations, by object.
#[derive(Debug, Default)]
pub(super) struct Declarations {
    by_key: BTreeMap<ObjectKey, BTreeMap<Position, Declaration>>,
    applied: BTreeMap<ObjectKey, Arc<Object>>,
    /// Objects declared more than once.
    duplicated: BTreeSet<ObjectKey>,
    /// Objects whose declarations changed since [`Self::changes`].
    changed: BTreeSet<ObjectKey>,
}

impl Declarations {
    /// Replaces the declarations of a file; `before` is what it declared until now.
    pub(super) fn replace(
        &mut self,
        file: &OsStr,
        before: &[(ObjectKey, Declaration)],
        now: &[(ObjectKey, Declaration)],
    ) {
        for (position, (key, _)) in before.iter().enumerate() {
            if let Entry::Occupied(mut declarations) = self.by_key.entry(key.clone()) {
                declarations.get_mut().remove(&(file.to_owned(), position));
                if declarations.get().is_empty() {
                    declarations.remove();
                }
            }
            self.changed.insert(key.clone());
        }
        for (position, (key, declaration)) in now.iter().enumerate() {
            self.by_key
                .entry(key.clone())
                .or_default()
                .insert((file.to_owned(), position), declaration.clone());
            self.changed.insert(key.clone());
        }
    }

    /// The events since the last call, removals first.
    pub(super) fn changes(&mut self) -> Vec<SourceEvent> {
        let (mut removed, mut upserted) = (Vec::new(), Vec::new());
        for key in std::mem::take(&mut self.changed) {
            let declarations = self.by_key.get(&key);
            if declarations.is_some_and(|declarations| declarations.len() > 1) {
                self.duplicated.insert(key.clone());
            } else {
                self.duplicated.remove(&key);
            }
            match declarations.and_then(|declarations| declarations.values().next()) {
                Some(Declaration::Invalid) => {}
                Some(Declaration::Valid(object)) => {
                    if self.applied.get(&key) != Some(object) {
                        upserted.push(SourceEvent::Upsert(Object::clone(object)));
                        self.applied.insert(key, Arc::clone(object));
                    }
                }
                Some(Declaration::Unused) | None => {
                    if let Some(object) = self.applied.remove(&key) {
                        removed.push(SourceEvent::Remove(key, *object.owner()));
                    }
                }
            }
        }
        removed.append(&mut upserted);
        removed
    }

    /// The file whose declaration applies to an object.
    pub(super) fn file_of(&self, key: &ObjectKey) -> Option<&OsStr> {
        let ((file, _), _) = self.by_key.get(key)?.first_key_value()?;
        Some(file)
    }

    #[cfg(test)]
    pub(super) fn declaration(&self, key: &ObjectKey) -> Option<Declaration> {
        self.by_key.get(key)?.values().next().cloned()
    }

    /// A problem for each declaration that does not apply.
    pub(super) fn duplicates(&self) -> impl Iterator<Item = Problem> {
        self.duplicated.iter().filter_map(|key| self.by_key.get_key_value(key)).flat_map(
            |(key, declarations)| {
                let mut files = declarations.keys().map(|(file, _)| file.to_string_lossy());
                let first = files.next().unwrap_or_default();
                files.map(move |file| {
                    let message = if file == first {
                        "is declared more than once in this file: only the first declaration applies"
                            .to_owned()
                    } else {
                        format!("is also declared in {first}, which takes precedence: remove one of the two")
                    };
                    Problem { subject: format!("{file}: {key}"), message }
                })
            },
        )
    }
}
