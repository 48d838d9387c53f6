//! `SERVICE_PORTS` and `FLOW_PORTS`: ports of the host that may be translated.

use std::collections::BTreeMap;

use aya::maps::{Array, MapData, MapError};
use dataplane_common::abi::{
    FlowKey, FlowRef, Port, PortSet, Service, ServiceKey,
    names::map::{self, FLOW_PORTS, SERVICE_PORTS},
};

use super::{
    maps::{HashTable, OpenError, open, table_error},
    pins::Pins,
    table::{Table, TableError},
};

type Chunk = [u8; PortSet::CHUNK];

/// Prepares both maps, if that has not been done: in tables with flows or frontends of an earlier
/// agent that had no such maps, every port may be translated.
pub(super) fn prepare(pins: &Pins) -> Result<(), OpenError> {
    for name in [SERVICE_PORTS, FLOW_PORTS] {
        let (mut map, _capacity): (Array<MapData, Chunk>, _) = open(pins, name)?;
        prepare_map(&mut map, || {
            let flows = HashTable::<FlowKey, FlowRef>::open(pins, map::FLOW_INDEX)?;
            let services = HashTable::<ServiceKey, Service>::open(pins, map::SERVICES)?;
            Ok(flows.is_empty() && services.is_empty())
        })
        .map_err(|error| match error {
            PrepareError::Open(error) => error,
            PrepareError::Map(source) => OpenError { map: name, source },
        })?;
    }
    Ok(())
}

enum PrepareError {
    Open(OpenError),
    Map(MapError),
}

impl From<MapError> for PrepareError {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

fn prepare_map(
    map: &mut Array<MapData, Chunk>,
    is_new: impl FnOnce() -> Result<bool, OpenError>,
) -> Result<(), PrepareError> {
    if map.get(&PortSet::PREPARED, 0)?[0] != 0 {
        return Ok(());
    }
    if !is_new().map_err(PrepareError::Open)? {
        for chunk in 0..PortSet::PREPARED {
            map.set(chunk, [1; PortSet::CHUNK], 0)?;
        }
    }
    // last: an agent that ends before begins again
    Ok(map.set(PortSet::PREPARED, [1; PortSet::CHUNK], 0)?)
}

/// `SERVICES`, with `SERVICE_PORTS` set before each row is inserted.
pub struct ServiceTable {
    rows: HashTable<ServiceKey, Service>,
    ports: Array<MapData, Chunk>,
    /// Chunks that have been read or written.
    chunks: BTreeMap<u32, Box<Chunk>>,
}

impl ServiceTable {
    pub(super) fn open(pins: &Pins) -> Result<Self, OpenError> {
        let (ports, _capacity) = open(pins, SERVICE_PORTS)?;
        Ok(Self { rows: HashTable::open(pins, map::SERVICES)?, ports, chunks: BTreeMap::new() })
    }

    fn set_port(&mut self, protocol: u8, port: Port) -> Result<(), MapError> {
        let Some(place) = PortSet::place(protocol, port) else { return Ok(()) };
        let mut chunk = match self.chunks.get(&place.chunk) {
            Some(chunk) => chunk.clone(),
            None => Box::new(self.ports.get(&place.chunk, 0)?),
        };
        if chunk[place.byte] == 0 {
            chunk[place.byte] = 1;
            self.ports.set(place.chunk, *chunk, 0)?;
        }
        self.chunks.insert(place.chunk, chunk);
        Ok(())
    }
}

impl Table<ServiceKey, Service> for ServiceTable {
    fn name(&self) -> &'static str {
        self.rows.name()
    }

    fn get(&self, key: &ServiceKey) -> Result<Option<Service>, TableError> {
        self.rows.get(key)
    }

    fn insert(&mut self, key: &ServiceKey, row: &Service) -> Result<(), TableError> {
        self.set_port(key.protocol, key.port)
            .map_err(|error| table_error(SERVICE_PORTS, PortSet::ENTRIES, "set", error))?;
        self.rows.insert(key, row)
    }

    fn remove(&mut self, key: &ServiceKey) -> Result<(), TableError> {
        self.rows.remove(key)
    }

    fn entries(&self) -> Result<Vec<(ServiceKey, Service)>, TableError> {
        self.rows.entries()
    }

    fn capacity(&self) -> u32 {
        self.rows.capacity()
    }
}
