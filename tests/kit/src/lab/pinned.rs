//! What the agent of a node has pinned: programs in links, and the maps of the programs.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::PathBuf,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    maps::MapData,
    programs::{
        ProgramInfo,
        links::{FdLink, PinnedLink},
    },
};
use dataplane_common::{ABI_VERSION, abi::names::program};

use super::Node;

impl Node {
    /// IDs of the programs in the pinned links, by the name of the link's pin.
    pub fn attached_programs(&self) -> Result<BTreeMap<String, u32>> {
        let mut programs = BTreeMap::new();
        for entry in fs::read_dir(self.pins("links"))? {
            let path = entry?.path();
            let link = PinnedLink::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            programs.insert(name, FdLink::from(link).info()?.program_id());
        }
        Ok(programs)
    }

    /// Bytes of all maps of the loaded programs, as the kernel counts.
    pub fn map_bytes(&self) -> Result<u64> {
        let mut maps = BTreeMap::new();
        for set in fs::read_dir(self.pins("programs"))? {
            let set = set?.path();
            let names = program::DEVICE.into_iter().chain(program::SOCKET);
            // a program that the configuration does not need is not there
            for pin in names.map(|name| set.join(name)).filter(|pin| pin.exists()) {
                for id in ProgramInfo::from_pin(pin)?.map_ids()?.unwrap_or_default() {
                    maps.insert(id, memory(id)?);
                }
            }
        }
        ensure!(!maps.is_empty(), "{} has no pinned programs", self.name());
        Ok(maps.values().sum())
    }

    fn pins(&self, kind: &str) -> PathBuf {
        self.bpffs().join("dataplane").join(format!("v{ABI_VERSION}")).join(kind)
    }
}

fn memory(map: u32) -> Result<u64> {
    let data = MapData::from_id(map)?;
    let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", data.fd().as_fd().as_raw_fd()))?;
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:"));
    Ok(bytes.context("no memlock in fdinfo")?.trim().parse()?)
}
