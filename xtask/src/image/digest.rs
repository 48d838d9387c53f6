//! What content is called by: `sha256:` and 64 hexadecimal digits.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// The digest of some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digest(String);

impl Digest {
    pub(super) fn of(content: &[u8]) -> Self {
        let mut hex = String::new();
        for byte in Sha256::digest(content) {
            hex += &format!("{byte:02x}");
        }
        Self(hex)
    }

    /// Without the name of the algorithm.
    pub(super) fn hex(&self) -> &str {
        &self.0
    }

    /// Where a layout has the content.
    pub(super) fn path(&self) -> String {
        format!("blobs/sha256/{}", self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_has_the_digest_everybody_knows() {
        assert_eq!(
            Digest::of(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
