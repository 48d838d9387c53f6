//! Which incarnation of an object: told apart, never shown.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// What is kept of a `metadata.uid`: 64 bits of hash, the same in every release, for an agent reads on disk what the one
/// before it wrote. Of two objects of one name, only chance of 1 in 2^64 makes one look like the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Uid(Option<NonZeroU64>);

impl Uid {
    /// The object says none.
    pub const fn is_empty(self) -> bool {
        self.0.is_none()
    }

    /// Whether it cannot be of the same incarnation. One that is not said may be any.
    pub fn excludes(self, other: Self) -> bool {
        !self.is_empty() && !other.is_empty() && self != other
    }
}

impl From<&str> for Uid {
    fn from(text: &str) -> Self {
        if text.is_empty() {
            return Self(None);
        }
        // FNV-1a
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        Self(Some(NonZeroU64::new(hash).unwrap_or(NonZeroU64::MIN)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_excludes_another_and_not_one_that_is_not_said() {
        let (one, other) = (Uid::from("6f1f3b0a-7a0e-4bb0-b7c7-4f1a2a0d2f10"), Uid::from("2"));
        assert!(one.excludes(other) && !one.excludes(one));
        assert!(!one.excludes(Uid::default()) && !Uid::default().excludes(one));
        assert_eq!(Uid::from(""), Uid::default());
    }

    /// An agent that hashed otherwise would take everything on disk for another cluster's.
    #[test]
    fn a_uid_is_kept_as_earlier_agents_kept_it() {
        let uid = Uid::from("6f1f3b0a-7a0e-4bb0-b7c7-4f1a2a0d2f10");
        assert_eq!(serde_json::to_string(&uid).unwrap(), "13030219969467825486");
    }
}
