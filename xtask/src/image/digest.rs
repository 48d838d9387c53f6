//! OCI digests: `sha256:` and 64 hexadecimal digits.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// The SHA-256 digest of a blob.
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

    /// The digest without the name of the algorithm.
    pub(super) fn hex(&self) -> &str {
        &self.0
    }

    /// Path of the blob in an OCI layout.
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
    fn digest_of_no_bytes_is_the_known_one() {
        assert_eq!(
            Digest::of(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
