//! `ALLOWED_SOURCES`: sources that a pod may use besides its own addresses.

use super::Addr;
use crate::abi;

abi! {
    /// Key of `ALLOWED_SOURCES`, an LPM trie: a source of packets from a pod's device. The prefix
    /// covers all of `ifindex`.
    ///
    /// A row never allows an address in `ENDPOINTS`, which belongs to this node or another pod.
    pub struct AllowedSource: 20 {
        /// Host-side device of the pod.
        pub ifindex: u32,
        /// Source address, or a prefix of it.
        pub addr: Addr,
    }
}
