//! The generation of everything that decides next hops: advanced after every change, so that flows
//! do not use what they cached before.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{Array, MapData, MapError};
use dataplane_common::abi::names::map;

use super::{maps, maps::OpenError, pins::Pins};

/// `FORWARDING_GENERATION`. Clones share it.
#[derive(Clone)]
pub struct ForwardingGeneration {
    map: Arc<Mutex<Array<MapData, u32>>>,
}

impl ForwardingGeneration {
    pub(super) fn open(pins: &Pins) -> Result<Self, OpenError> {
        let (map, _capacity) = maps::open(pins, map::FORWARDING_GENERATION)?;
        Ok(Self { map: Arc::new(Mutex::new(map)) })
    }

    /// Makes every next hop that was cached before this call invalid.
    ///
    /// If two handles advance it at the same time, it advances once: both changes come before.
    pub fn advance(&self) -> Result<(), MapError> {
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let next = map.get(&0, 0)?.wrapping_add(1);
        map.set(0, next, 0)
    }
}

impl fmt::Debug for ForwardingGeneration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(map::FORWARDING_GENERATION)
    }
}
