//! Interned names: each text is in memory once. A cluster repeats a node's name for every endpoint
//! on it.

use std::{
    borrow::{Borrow, Cow},
    collections::HashSet,
    fmt,
    ops::Deref,
    sync::{LazyLock, Mutex, PoisonError},
};

use arcstr::ArcStr;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Below this size, unused names are not swept.
const SWEEP_MIN: usize = 1_024;

static INTERNER: LazyLock<Mutex<Interner>> = LazyLock::new(Mutex::default);

/// Interned text. A clone, or another name with the same text, costs one pointer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(ArcStr);

/// The interned texts, including some that are no longer used.
#[derive(Default)]
struct Interner {
    names: HashSet<ArcStr>,
    /// Number of names after the last sweep.
    kept_by_sweep: usize,
}

impl Interner {
    fn intern(&mut self, text: &str) -> ArcStr {
        if let Some(name) = self.names.get(text) {
            return name.clone();
        }
        // sweep when the table doubled: the cost per new name stays constant
        if self.names.len() >= SWEEP_MIN.max(2 * self.kept_by_sweep) {
            // no count: static text, which is never freed
            self.names.retain(|name| ArcStr::strong_count(name).is_none_or(|count| count > 1));
            self.names.shrink_to(2 * self.names.len());
            self.kept_by_sweep = self.names.len();
        }
        let name = ArcStr::from(text);
        self.names.insert(name.clone());
        name
    }
}

impl Name {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        // a panic cannot leave the table half updated
        Self(INTERNER.lock().unwrap_or_else(PoisonError::into_inner).intern(text))
    }
}

impl From<String> for Name {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl Default for Name {
    fn default() -> Self {
        "".into()
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        self
    }
}

impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        **self == *other
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        **self == **other
    }
}

impl PartialEq<String> for Name {
    fn eq(&self, other: &String) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&**self, f)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok((&*Cow::<str>::deserialize(deserializer)?).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_share_memory() {
        let (one, other) = (Name::from("far-1"), Name::from("far-1".to_owned()));
        assert!(ArcStr::ptr_eq(&one.0, &other.0));
        let read: Name = serde_json::from_str(&serde_json::to_string(&one).unwrap()).unwrap();
        assert!(ArcStr::ptr_eq(&one.0, &read.0));
        assert_ne!(one, Name::from("far-2"));
    }

    #[test]
    fn sweep_drops_unused_names_and_keeps_others() {
        let mut interner = Interner::default();
        let kept = interner.intern("kept");
        for number in 0..10 * SWEEP_MIN {
            interner.intern(&format!("gone-{number}"));
        }
        assert!(interner.names.len() <= SWEEP_MIN, "{} names", interner.names.len());
        assert!(ArcStr::ptr_eq(&kept, &interner.intern("kept")));
    }
}
