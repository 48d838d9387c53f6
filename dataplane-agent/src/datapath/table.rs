//! A table of the datapath, as the reconciler sees it.

use dataplane_common::abi::{Addr, SourceRange};

/// Key of the route table: a prefix of an [`Addr`]; an IPv4 prefix length counts from bit 96.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoutePrefix {
    pub addr: Addr,
    /// 0 to 128.
    pub bits: u32,
}

/// Key of the table of source ranges: a prefix of a [`SourceRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourcePrefix {
    pub range: SourceRange,
    /// 32 to 160.
    pub bits: u32,
}

/// Why a table refused.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// No room: raise the capacity.
    #[error("table {table} is full ({capacity} entries)")]
    Full { table: &'static str, capacity: u32 },
    /// The kernel refused.
    #[error("{operation} in table {table}: {source}")]
    Kernel { table: &'static str, operation: &'static str, source: std::io::Error },
}

/// A keyed table whose entries other processors read while it changes: each call is atomic for one entry.
pub trait Table<K, V>: Send {
    fn name(&self) -> &'static str;
    fn get(&self, key: &K) -> Result<Option<V>, TableError>;
    /// Writes the entry, whether or not it exists.
    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError>;
    /// Removes the entry; one that is not there is no error.
    fn remove(&mut self, key: &K) -> Result<(), TableError>;
    /// Every entry, in no order. An array yields all its slots.
    fn entries(&self) -> Result<Vec<(K, V)>, TableError>;
    fn capacity(&self) -> u32;
}
