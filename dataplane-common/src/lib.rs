//! The contract between the datapath (`dataplane-ebpf`) and user space (`dataplane-agent`).
//!
//! Owns the layout of every map key and value, the numbers of verdicts and drop reasons, the rules
//! that both sides must agree on (flow timeouts, hashes, Maglev), and checksum arithmetic. Knows no
//! kernel helper, map handle or Kubernetes object.
//!
//! **Byte order.** Addresses and ports are in network byte order ([`abi::Addr`], [`abi::Port`]);
//! host order exists only behind getters. Counts, indices and interface numbers are native
//! integers.
//!
//! **Padding.** A type in [`mod@abi`] has no implicit padding: [`abi!`](macro@crate::abi) asserts
//! that its size is the sum of its fields, so that equal values are equal bytes and a lookup by key
//! finds them.
#![cfg_attr(not(any(test, feature = "user")), no_std)]
#![deny(missing_docs)]

/// Version of everything under [`mod@abi`]. Maps are pinned under
/// `<bpffs>/dataplane/v<ABI_VERSION>/`. Raise it whenever a layout, a map type or the meaning of a
/// field changes, so that a newer agent does not use an older one's maps.
pub const ABI_VERSION: u32 = 7;

pub mod abi;
pub mod budget;
pub mod checksum;
pub mod crc32c;
#[cfg(feature = "user")]
pub mod ethtool;
pub mod flow;
pub mod hash;
pub mod maglev;
pub mod net;
#[cfg(feature = "user")]
pub mod netns;
pub mod reason;
