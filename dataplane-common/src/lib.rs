//! The contract between the datapath (`dataplane-ebpf`) and user space (`dataplane-agent`).
//!
//! Owns the layout of every map key and value, the numbers of every verdict and drop reason, and the packet
//! algebra both sides must agree on. Knows no kernel helper, no map handle and no Kubernetes object.
//!
//! **Byte order.** Addresses and ports lie in memory as they lie in a packet ([`abi::Addr`], [`abi::Port`]); host
//! order exists only behind getters. Counts, indices and interface numbers are native integers.
//!
//! **Padding.** A type in [`mod@abi`] has no implicit padding: [`abi!`](macro@crate::abi) asserts that its size is the
//! sum of its fields, so two equal values are equal bytes and a key is never missed.
#![cfg_attr(not(any(test, feature = "user")), no_std)]
#![deny(missing_docs)]

/// Version of everything under [`mod@abi`]. Pins live under `<bpffs>/dataplane/v<ABI_VERSION>/`: raise it whenever a layout, a map
/// type or the meaning of a field changes, so that an older agent's tables are never read with newer eyes.
pub const ABI_VERSION: u32 = 6;

pub mod abi;
pub mod checksum;
pub mod crc32c;
pub mod flow;
pub mod hash;
pub mod maglev;
pub mod net;
#[cfg(feature = "user")]
pub mod netns;
pub mod reason;
