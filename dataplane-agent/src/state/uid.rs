//! A compact object UID, to compare incarnations.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// A 64-bit hash of `metadata.uid`. The hash is stable across releases, because an agent reads what
/// its predecessor wrote to disk. Two incarnations collide with probability 2^-64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Uid(Option<NonZeroU64>);

impl Uid {
    /// Whether the object has no UID.
    pub const fn is_empty(self) -> bool {
        self.0.is_none()
    }

    /// Whether the two cannot be the same incarnation. An unknown UID may be any.
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
    fn uid_excludes_other_uid_but_not_unknown_uid() {
        let (one, other) = (Uid::from("6f1f3b0a-7a0e-4bb0-b7c7-4f1a2a0d2f10"), Uid::from("2"));
        assert!(one.excludes(other) && !one.excludes(one));
        assert!(!one.excludes(Uid::default()) && !Uid::default().excludes(one));
        assert_eq!(Uid::from(""), Uid::default());
    }

    /// Another hash would make an upgraded agent discard its cached state.
    #[test]
    fn uid_hash_is_stable_across_releases() {
        let uid = Uid::from("6f1f3b0a-7a0e-4bb0-b7c7-4f1a2a0d2f10");
        assert_eq!(serde_json::to_string(&uid).unwrap(), "13030219969467825486");
    }
}
