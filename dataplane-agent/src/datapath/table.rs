//! The reconciler's interface to a map of the datapath.

use dataplane_common::abi::{Addr, AllowedSource, SourceRange};

/// Key of `ROUTES`: a prefix of an [`Addr`]. IPv4 prefixes start at bit 96.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoutePrefix {
    pub addr: Addr,
    /// 0 to 128.
    pub bits: u32,
}

/// Key of `SOURCE_RANGES`: a prefix of a [`SourceRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourcePrefix {
    pub range: SourceRange,
    /// 32 to 160.
    pub bits: u32,
}

/// Key of `ALLOWED_SOURCES`: a prefix of an [`AllowedSource`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AllowedPrefix {
    pub source: AllowedSource,
    /// 32 to 160.
    pub bits: u32,
}

/// Why a table operation failed.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The table has no free entry.
    #[error("table {table} is full ({capacity} entries)")]
    Full { table: &'static str, capacity: u32 },
    /// The kernel returned an error.
    #[error("{operation} in table {table}: {source}")]
    Kernel { table: &'static str, operation: &'static str, source: std::io::Error },
}

/// A keyed table that the datapath reads concurrently: each call is atomic for one entry.
pub trait Table<K, V>: Send {
    fn name(&self) -> &'static str;
    fn get(&self, key: &K) -> Result<Option<V>, TableError>;
    /// Creates or replaces the entry.
    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError>;
    /// Removes the entry. A missing entry is not an error.
    fn remove(&mut self, key: &K) -> Result<(), TableError>;
    /// All entries, in no particular order. An array returns all its slots.
    fn entries(&self) -> Result<Vec<(K, V)>, TableError>;
    fn capacity(&self) -> u32;
}
