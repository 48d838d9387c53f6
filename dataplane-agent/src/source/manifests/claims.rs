//! Who says what of which object, and what is believed.
//!
//! Of several files (or places in one) that name the same object, the first counts, in the order of file names; the
//! others are problems. While it is broken, its last good state stays. So what is believed depends on what the files
//! say, and on nothing else but what was good before. Work is proportional to the objects of changed files.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ffi::{OsStr, OsString},
    sync::Arc,
};

use super::parse::Claim;
use crate::{
    source::Problem,
    state::{Object, ObjectKey, SourceEvent},
};

/// File, and place in it.
type Place = (OsString, usize);

/// Every claim, by object.
#[derive(Debug, Default)]
pub(super) struct Claims {
    by_key: BTreeMap<ObjectKey, BTreeMap<Place, Claim>>,
    believed: BTreeMap<ObjectKey, Arc<Object>>,
    /// Objects named more than once.
    contested: BTreeSet<ObjectKey>,
    /// Objects whose claims changed since [`Self::changes`].
    touched: BTreeSet<ObjectKey>,
}

impl Claims {
    /// The file says this now; `before` is what it said.
    pub(super) fn replace(
        &mut self,
        file: &OsStr,
        before: &[(ObjectKey, Claim)],
        now: &[(ObjectKey, Claim)],
    ) {
        for (place, (key, _)) in before.iter().enumerate() {
            if let Entry::Occupied(mut claims) = self.by_key.entry(key.clone()) {
                claims.get_mut().remove(&(file.to_owned(), place));
                if claims.get().is_empty() {
                    claims.remove();
                }
            }
            self.touched.insert(key.clone());
        }
        for (place, (key, claim)) in now.iter().enumerate() {
            self.by_key.entry(key.clone()).or_default().insert((file.to_owned(), place), claim.clone());
            self.touched.insert(key.clone());
        }
    }

    /// What is believed now and was not at the last call: removals first.
    pub(super) fn changes(&mut self) -> Vec<SourceEvent> {
        let (mut removed, mut upserted) = (Vec::new(), Vec::new());
        for key in std::mem::take(&mut self.touched) {
            let claims = self.by_key.get(&key);
            if claims.is_some_and(|claims| claims.len() > 1) {
                self.contested.insert(key.clone());
            } else {
                self.contested.remove(&key);
            }
            match claims.and_then(|claims| claims.values().next()) {
                Some(Claim::Broken) => {}
                Some(Claim::Is(object)) => {
                    if self.believed.get(&key) != Some(object) {
                        upserted.push(SourceEvent::Upsert(Object::clone(object)));
                        self.believed.insert(key, Arc::clone(object));
                    }
                }
                Some(Claim::Nothing) | None => {
                    if let Some(gone) = self.believed.remove(&key) {
                        removed.push(SourceEvent::Remove(key, *gone.owner()));
                    }
                }
            }
        }
        removed.append(&mut upserted);
        removed
    }

    /// The file that counts for an object.
    pub(super) fn file_of(&self, key: &ObjectKey) -> Option<&OsStr> {
        let ((file, _), _) = self.by_key.get(key)?.first_key_value()?;
        Some(file)
    }

    #[cfg(test)]
    pub(super) fn claim(&self, key: &ObjectKey) -> Option<Claim> {
        self.by_key.get(key)?.values().next().cloned()
    }

    /// A problem for each place that does not count.
    pub(super) fn duplicates(&self) -> impl Iterator<Item = Problem> {
        self.contested.iter().filter_map(|key| self.by_key.get_key_value(key)).flat_map(|(key, claims)| {
            let mut places = claims.keys().map(|(file, _)| file.to_string_lossy());
            let first = places.next().unwrap_or_default();
            places.map(move |file| {
                let message = if file == first {
                    "is in this file more than once: the first counts".to_owned()
                } else {
                    format!("is in {first} too, which counts")
                };
                Problem { subject: format!("{file}: {key}"), message }
            })
        })
    }
}
