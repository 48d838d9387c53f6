//! The datapath's maps as [`Table`]s. They are opened by pin, so any process of the node can use
//! them.

use std::io;

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key},
};
use dataplane_common::abi::{
    Addr, AllowedSource, BackendSlot, Endpoint, Flow, FlowKey, FlowRef, PodSource, Route, SourceRange,
    names::map,
};

use super::{
    generation::ForwardingGeneration,
    pins::Pins,
    ports::ServiceTable,
    table::{AllowedPrefix, RoutePrefix, SourcePrefix, Table, TableError},
};

/// Why a pinned map could not be opened: it is missing, or has another type, key size or value
/// size.
#[derive(Debug, thiserror::Error)]
#[error("open pinned map {map}: {source}")]
pub struct OpenError {
    pub map: &'static str,
    pub source: MapError,
}

/// All tables that the agent writes, and the two maps of the flow table, which it reads.
pub struct Tables {
    pub endpoints: HashTable<Addr, Endpoint>,
    pub pod_sources: ArrayTable<PodSource>,
    pub routes: LpmTable<RoutePrefix, Route>,
    pub services: ServiceTable,
    pub backends: ArrayTable<BackendSlot>,
    pub backend_generations: ArrayTable<u32>,
    pub source_ranges: LpmTable<SourcePrefix, u32>,
    pub flow_index: HashTable<FlowKey, FlowRef>,
    pub flows: ArrayTable<Flow>,
}

impl Tables {
    pub fn open(pins: &Pins) -> Result<Self, OpenError> {
        Ok(Self {
            endpoints: HashTable::open(pins, map::ENDPOINTS)?,
            pod_sources: ArrayTable::open(pins, map::POD_SOURCES)?,
            routes: LpmTable::open(pins, map::ROUTES)?,
            services: ServiceTable::open(pins)?,
            backends: ArrayTable::open(pins, map::BACKENDS)?,
            backend_generations: ArrayTable::open(pins, map::BACKEND_GENERATIONS)?,
            source_ranges: LpmTable::open(pins, map::SOURCE_RANGES)?,
            flow_index: HashTable::open(pins, map::FLOW_INDEX)?,
            flows: ArrayTable::open(pins, map::FLOWS)?,
        })
    }
}

/// Opens a pinned map and returns its actual capacity, which may differ from the configured one.
pub(super) fn open<T>(pins: &Pins, name: &'static str) -> Result<(T, u32), OpenError>
where
    T: TryFrom<Map, Error = MapError>,
{
    let opened = || {
        let data = MapData::from_pin(pins.map(name))?;
        let capacity = data.info()?.max_entries();
        Ok((T::try_from(Map::from_map_data(data)?)?, capacity))
    };
    opened().map_err(|source| OpenError { map: name, source })
}

/// The generation to advance, if the table decides next hops.
fn generation_of(pins: &Pins, name: &str) -> Result<Option<ForwardingGeneration>, OpenError> {
    map::FORWARDING.contains(&name).then(|| ForwardingGeneration::open(pins)).transpose()
}

/// The result of a change, after which next hops that were cached before it are invalid.
fn changed(generation: Option<&ForwardingGeneration>, result: Result<(), MapError>) -> Result<(), MapError> {
    result.and_then(|()| generation.map_or(Ok(()), ForwardingGeneration::advance))
}

/// A hash map.
#[derive(Debug)]
pub struct HashTable<K, V> {
    name: &'static str,
    capacity: u32,
    map: HashMap<MapData, K, V>,
    generation: Option<ForwardingGeneration>,
}

impl<K: Pod, V: Pod> HashTable<K, V> {
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, OpenError> {
        let (map, capacity) = open(pins, name)?;
        Ok(Self { name, capacity, map, generation: generation_of(pins, name)? })
    }
}

impl<K: Pod, V: Pod> HashTable<K, V> {
    pub(super) fn is_empty(&self) -> bool {
        self.map.keys().next().is_none()
    }
}

impl<K: Pod + Send, V: Pod + Send> Table<K, V> for HashTable<K, V> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        found(self.map.get(key, 0)).map_err(|error| self.table_error("get", error))
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let inserted = self.map.insert(key, value, 0);
        changed(self.generation.as_ref(), inserted).map_err(|error| self.table_error("insert", error))
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let removed = removed(self.map.remove(key));
        changed(self.generation.as_ref(), removed).map_err(|error| self.table_error("remove", error))
    }

    fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        self.map.iter().collect::<Result<_, _>>().map_err(|error| self.table_error("list", error))
    }

    fn capacity(&self) -> u32 {
        self.capacity
    }
}

impl<K, V> HashTable<K, V> {
    fn table_error(&self, operation: &'static str, error: MapError) -> TableError {
        table_error(self.name, self.capacity, operation, error)
    }
}

/// A key of an LPM trie.
pub trait Prefix: Copy + Send {
    type Data: Pod + PartialEq + Send;
    /// The first `bits` of `data`.
    fn new(data: Self::Data, bits: u32) -> Self;
    fn data(&self) -> Self::Data;
    fn bits(&self) -> u32;

    fn key(&self) -> Key<Self::Data> {
        Key::new(self.bits(), self.data())
    }
}

impl Prefix for RoutePrefix {
    type Data = Addr;

    fn new(addr: Addr, bits: u32) -> Self {
        Self { addr, bits }
    }

    fn data(&self) -> Addr {
        self.addr
    }

    fn bits(&self) -> u32 {
        self.bits
    }
}

impl Prefix for SourcePrefix {
    type Data = SourceRange;

    fn new(range: SourceRange, bits: u32) -> Self {
        Self { range, bits }
    }

    fn data(&self) -> SourceRange {
        self.range
    }

    fn bits(&self) -> u32 {
        self.bits
    }
}

impl Prefix for AllowedPrefix {
    type Data = AllowedSource;

    fn new(source: AllowedSource, bits: u32) -> Self {
        Self { source, bits }
    }

    fn data(&self) -> AllowedSource {
        self.source
    }

    fn bits(&self) -> u32 {
        self.bits
    }
}

/// An LPM trie.
#[derive(Debug)]
pub struct LpmTable<P: Prefix, V> {
    name: &'static str,
    capacity: u32,
    map: LpmTrie<MapData, P::Data, V>,
    generation: Option<ForwardingGeneration>,
}

impl<P: Prefix, V: Pod> LpmTable<P, V> {
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, OpenError> {
        let (map, capacity) = open(pins, name)?;
        Ok(Self { name, capacity, map, generation: generation_of(pins, name)? })
    }

    fn table_error(&self, operation: &'static str, error: MapError) -> TableError {
        table_error(self.name, self.capacity, operation, error)
    }
}

impl<V: Pod> LpmTable<RoutePrefix, V> {
    /// The value of the longest prefix that covers `addr`, as in the datapath.
    pub fn lookup(&self, addr: Addr) -> Result<Option<V>, TableError> {
        found(self.map.get(&Key::new(128, addr), 0)).map_err(|error| self.table_error("look up", error))
    }
}

impl<P: Prefix, V: Pod + Send> Table<P, V> for LpmTable<P, V> {
    fn name(&self) -> &'static str {
        self.name
    }

    /// The value of exactly this prefix. A lookup returns the longest prefix that covers the key,
    /// which may be a shorter one, so this walks all keys.
    fn get(&self, prefix: &P) -> Result<Option<V>, TableError> {
        for key in self.map.keys() {
            let key = key.map_err(|error| self.table_error("list", error))?;
            if key.prefix_len() == prefix.bits() && key.data() == prefix.data() {
                return found(self.map.get(&key, 0)).map_err(|error| self.table_error("get", error));
            }
        }
        Ok(None)
    }

    fn insert(&mut self, prefix: &P, value: &V) -> Result<(), TableError> {
        let inserted = self.map.insert(&prefix.key(), value, 0);
        changed(self.generation.as_ref(), inserted).map_err(|error| self.table_error("insert", error))
    }

    fn remove(&mut self, prefix: &P) -> Result<(), TableError> {
        let removed = removed(self.map.remove(&prefix.key()));
        changed(self.generation.as_ref(), removed).map_err(|error| self.table_error("remove", error))
    }

    fn entries(&self) -> Result<Vec<(P, V)>, TableError> {
        let mut entries = Vec::new();
        for entry in &self.map {
            let (key, value) = entry.map_err(|error| self.table_error("list", error))?;
            entries.push((P::new(key.data(), key.prefix_len()), value));
        }
        Ok(entries)
    }

    fn capacity(&self) -> u32 {
        self.capacity
    }
}

/// An array. Its entries always exist: removing one sets it to zero.
pub struct ArrayTable<V: Pod> {
    name: &'static str,
    capacity: u32,
    map: Array<MapData, V>,
    generation: Option<ForwardingGeneration>,
}

impl<V: Pod> ArrayTable<V> {
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, OpenError> {
        let (map, capacity) = open(pins, name)?;
        Ok(Self { name, capacity, map, generation: generation_of(pins, name)? })
    }

    fn table_error(&self, operation: &'static str, error: MapError) -> TableError {
        table_error(self.name, self.capacity, operation, error)
    }
}

impl<V: Pod + Default + Send> Table<u32, V> for ArrayTable<V> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn get(&self, index: &u32) -> Result<Option<V>, TableError> {
        if *index >= self.capacity {
            return Ok(None);
        }
        found(self.map.get(index, 0)).map_err(|error| self.table_error("get", error))
    }

    fn insert(&mut self, index: &u32, value: &V) -> Result<(), TableError> {
        if *index >= self.capacity {
            return Err(TableError::Full { table: self.name, capacity: self.capacity });
        }
        let set = self.map.set(*index, value, 0);
        changed(self.generation.as_ref(), set).map_err(|error| self.table_error("set", error))
    }

    fn remove(&mut self, index: &u32) -> Result<(), TableError> {
        if *index >= self.capacity {
            return Ok(());
        }
        self.insert(index, &V::default())
    }

    fn entries(&self) -> Result<Vec<(u32, V)>, TableError> {
        let mut entries = Vec::with_capacity(self.capacity as usize);
        for index in 0..self.capacity {
            let value = self.map.get(&index, 0).map_err(|error| self.table_error("list", error))?;
            entries.push((index, value));
        }
        Ok(entries)
    }

    fn capacity(&self) -> u32 {
        self.capacity
    }
}

fn found<V>(result: Result<V, MapError>) -> Result<Option<V>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn removed(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(nix::libc::ENOENT) => {
            Ok(())
        }
        result => result,
    }
}

/// A full hash map returns E2BIG, a full LPM trie ENOSPC.
pub(super) fn table_error(
    table: &'static str,
    capacity: u32,
    operation: &'static str,
    error: MapError,
) -> TableError {
    let source = match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::IoError(error) => error,
        other => io::Error::other(other),
    };
    match source.raw_os_error() {
        Some(nix::libc::E2BIG | nix::libc::ENOSPC) => TableError::Full { table, capacity },
        _ => TableError::Kernel { table, operation, source },
    }
}
