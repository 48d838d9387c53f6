//! Names, each of them once in memory: a cluster says the name of a node for every endpoint there.

use std::{
    borrow::{Borrow, Cow},
    collections::HashSet,
    fmt,
    ops::Deref,
    sync::{LazyLock, Mutex, PoisonError},
};

use arcstr::ArcStr;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The table is not looked through for names nobody has before it holds so many.
const FEW: usize = 1_024;

static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);

/// Text that many hold: a clone costs no memory but its own pointer, nor does the same text from elsewhere.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(ArcStr);

/// The text of every name, and of some that are gone.
#[derive(Default)]
struct Known {
    names: HashSet<ArcStr>,
    /// Names that were left after the last look for those that are gone.
    left: usize,
}

impl Known {
    fn intern(&mut self, text: &str) -> ArcStr {
        if let Some(name) = self.names.get(text) {
            return name.clone();
        }
        // half of them may be gone: looking for them costs little per name that came since
        if self.names.len() >= FEW.max(2 * self.left) {
            // no count: text of the program itself, which is nobody's to forget
            self.names.retain(|name| ArcStr::strong_count(name).is_none_or(|count| count > 1));
            self.names.shrink_to(2 * self.names.len());
            self.left = self.names.len();
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
        // nothing in there panics half way
        Self(KNOWN.lock().unwrap_or_else(PoisonError::into_inner).intern(text))
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
    fn the_same_name_is_in_memory_once() {
        let (one, other) = (Name::from("far-1"), Name::from("far-1".to_owned()));
        assert!(ArcStr::ptr_eq(&one.0, &other.0));
        let read: Name = serde_json::from_str(&serde_json::to_string(&one).unwrap()).unwrap();
        assert!(ArcStr::ptr_eq(&one.0, &read.0));
        assert_ne!(one, Name::from("far-2"));
    }

    #[test]
    fn names_that_are_gone_are_forgotten_and_the_others_kept() {
        let mut known = Known::default();
        let kept = known.intern("kept");
        for number in 0..10 * FEW {
            known.intern(&format!("gone-{number}"));
        }
        assert!(known.names.len() <= FEW, "{} names", known.names.len());
        assert!(ArcStr::ptr_eq(&kept, &known.intern("kept")));
    }
}
