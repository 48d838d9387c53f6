//! Loads the eBPF object: adopts pinned maps or creates them, and loads every program through the
//! verifier.
//!
//! Nothing is attached here: if the kernel rejects a program, the programs of the last agent stay
//! attached. Pins keep everything that outlives the agent: dropping [`Datapath`] closes file
//! descriptors and detaches nothing.

use std::{io, path::PathBuf, thread, time::Duration};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, MapData, MapError, MapInfo},
    pin::PinError,
    programs::{Program, ProgramError},
};
use dataplane_common::abi::{
    ConnectedPeer, Device, FlowBlock, NodeConfig, NodeVariables,
    names::{self, capacity, map, program},
};

use super::{
    attach::TcHooks,
    generation::ForwardingGeneration,
    kernel_features,
    log::EbpfLog,
    maps::{HashTable, LpmTable, OpenError, Tables},
    pins::{Pins, PinsError},
    table::AllowedPrefix,
    xdp::XdpUse,
};

/// The eBPF object, built from the crate `dataplane-ebpf` by `build.rs`.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dataplane"));

/// Number of attempts to load a program while signals interrupt the verifier.
const LOAD_ATTEMPTS: usize = 50;
/// Pause between them: a signal may stay pending for a moment.
const LOAD_PAUSE: Duration = Duration::from_millis(20);
/// Number of characters of the verifier log in an error. Its end has the reason.
const LOG_TAIL: usize = 1_500;
/// Prefixes of the statistics lines that follow the reason. Linux 7 has one for every function.
const STATISTICS_PREFIXES: [&str; 4] = ["verification time", "stack depth", "subprog ", "processed "];

/// Why the datapath could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Pins(#[from] PinsError),
    #[error("load the eBPF object: {0}")]
    Object(#[source] EbpfError),
    #[error("the eBPF object has no program {0}")]
    NoProgram(&'static str),
    #[error("the kernel rejected program {program}: {reason}")]
    Program { program: &'static str, reason: String },
    #[error("fill map {map}: {source}")]
    Fill { map: &'static str, source: MapError },
    #[error("pin map {map}: {source}")]
    Pin { map: &'static str, source: PinError },
    #[error("{0}; if another build left it, remove it with `dataplane-agent cleanup`")]
    Open(#[from] OpenError),
}

/// Options of the loader.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Mount point of the BPF file system. It is mounted if it is not yet.
    pub bpffs: PathBuf,
    /// Constants of the programs. The loader sets `flow_slots`.
    pub node: NodeConfig,
    pub capacity: Capacity,
    pub log: EbpfLog,
    pub tc: TcHooks,
    pub xdp: XdpUse,
}

/// Number of entries of the maps whose capacity can be configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub endpoints: u32,
    pub routes: u32,
    pub services: u32,
    pub backends: u32,
    pub backend_generations: u32,
    pub flows: u32,
    pub fragments: u32,
    pub datagram_origins: u32,
    pub source_ranges: u32,
    pub affinity: u32,
    /// Size of the ring buffer in bytes, a power of two.
    pub events_bytes: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            endpoints: capacity::ENDPOINTS,
            routes: capacity::ROUTES,
            services: capacity::SERVICES,
            backends: capacity::BACKENDS,
            backend_generations: capacity::BACKEND_GENERATIONS,
            flows: capacity::FLOWS,
            fragments: capacity::FRAGMENTS,
            datagram_origins: capacity::DATAGRAM_ORIGINS,
            source_ranges: capacity::SOURCE_RANGES,
            affinity: capacity::AFFINITY,
            events_bytes: capacity::EVENTS_BYTES,
        }
    }
}

impl Capacity {
    fn by_map(&self) -> [(&'static str, u32); 13] {
        [
            (map::ENDPOINTS, self.endpoints),
            (map::ROUTES, self.routes),
            (map::SERVICES, self.services),
            (map::BACKENDS, self.backends),
            (map::BACKEND_GENERATIONS, self.backend_generations),
            (map::FLOWS, self.flows),
            (map::FLOW_BLOCKS, FlowBlock::count(self.flows)),
            // one entry per direction
            (map::FLOW_INDEX, self.flows.saturating_mul(2)),
            (map::FRAGMENTED_PACKETS, self.fragments),
            (map::DATAGRAM_ORIGINS, self.datagram_origins),
            (map::SOURCE_RANGES, self.source_ranges),
            (map::AFFINITY, self.affinity),
            (map::EVENTS, self.events_bytes),
        ]
    }
}

/// The loaded programs and their maps.
#[derive(Debug)]
pub struct Datapath {
    pub(super) ebpf: Ebpf,
    pub(super) pins: Pins,
    pub(super) tc: TcHooks,
    pub(super) xdp: XdpUse,
    generation: ForwardingGeneration,
    problems: Vec<String>,
    adopted: u32,
}

/// A loaded program, for reports.
#[derive(Clone, Debug)]
pub struct ProgramReport {
    pub name: &'static str,
    pub id: u32,
    /// Number of instructions the verifier processed; Linux 5.16 and later.
    pub verified_instructions: Option<u32>,
}

impl Datapath {
    /// Loads every program, with pinned maps of an earlier agent or new ones.
    pub fn load(config: &DatapathConfig) -> Result<Self, LoadError> {
        Self::load_object(OBJECT, config)
    }

    /// Loads an object other than the embedded one.
    pub fn load_object(object: &[u8], config: &DatapathConfig) -> Result<Self, LoadError> {
        let pins = Pins::new(&config.bpffs);
        pins.prepare()?;
        take_over(&pins)?;
        let adopted = map::PINNED.iter().filter(|name| pins.map(name).exists()).count() as u32;
        let (capacities, problems) = effective_capacities(&pins, &config.capacity);
        let mut node = config.node;
        node.flow_slots = capacity_of(&capacities, map::FLOWS);
        node.flags |= kernel_features::flags();

        let level = config.log.number();
        let mut loader = EbpfLoader::new();
        loader.override_global(names::NODE, &node, true);
        // an object without log calls does not have this symbol
        loader.override_global(aya_log::LEVEL, &level, false);
        for (name, entries) in capacities {
            loader.map_max_entries(name, entries);
        }
        loader.map_max_entries(map::FLOW_NEXT_HOPS, node.flow_slots.saturating_mul(2));
        for name in map::PINNED {
            loader.map_pin_path(name, pins.map(name));
        }
        let mut ebpf = loader.load(object).map_err(LoadError::Object)?;
        // before the programs are loaded: the verifier's error about a map of another layout is
        // harder to read
        Tables::open(&pins)?;
        HashTable::<u32, Device>::open(&pins, map::DEVICES)?;
        LpmTable::<AllowedPrefix, u32>::open(&pins, map::ALLOWED_SOURCES)?;
        load_programs(&mut ebpf, used_programs(config.xdp))?;
        let generation = ForwardingGeneration::open(&pins)?;
        Ok(Self { ebpf, pins, tc: config.tc, xdp: config.xdp, generation, problems, adopted })
    }

    /// What the operator should know: pinned maps whose capacity differs from the configuration.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Number of tables of an earlier agent that it has adopted.
    pub const fn adopted(&self) -> u32 {
        self.adopted
    }

    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Sets the node's variables in the programs, including those already attached.
    ///
    /// The write is not atomic: a packet that is masqueraded at the same time may get a mix of the
    /// old and the new address.
    pub fn set_variables(&mut self, variables: NodeVariables) -> Result<(), LoadError> {
        let failed = |source| LoadError::Fill { map: names::DATA, source };
        let missing = || MapError::InvalidName { name: names::DATA.to_owned() };
        let map = self.ebpf.map_mut(names::DATA).ok_or_else(|| failed(missing()))?;
        let mut data: Array<&mut MapData, NodeVariables> = Array::try_from(map).map_err(failed)?;
        data.set(0, variables, 0).map_err(failed)?;
        self.generation
            .advance()
            .map_err(|source| LoadError::Fill { map: map::FORWARDING_GENERATION, source })
    }

    /// The generation of everything that decides next hops.
    pub fn forwarding_generation(&self) -> ForwardingGeneration {
        self.generation.clone()
    }

    /// Opens the tables. Each call returns new handles to the same maps.
    pub fn tables(&self) -> Result<Tables, OpenError> {
        Tables::open(&self.pins)
    }

    /// The backends of connected UDP sockets, by socket cookie.
    pub fn connected_peers(&self) -> Result<HashTable<u64, ConnectedPeer>, OpenError> {
        HashTable::open(&self.pins, map::CONNECTED_PEERS)
    }

    /// The devices that carry the node's traffic, by index.
    pub fn devices(&self) -> Result<HashTable<u32, Device>, OpenError> {
        HashTable::open(&self.pins, map::DEVICES)
    }

    /// The sources that pods may use besides their own addresses.
    pub fn allowed_sources(&self) -> Result<LpmTable<AllowedPrefix, u32>, OpenError> {
        LpmTable::open(&self.pins, map::ALLOWED_SOURCES)
    }

    /// The kernel's information on every loaded program.
    pub fn programs(&self) -> Result<Vec<ProgramReport>, ProgramError> {
        let mut reports = Vec::new();
        for name in used_programs(self.xdp) {
            let Some(program) = self.ebpf.program(name) else { continue };
            let info = program.info()?;
            reports.push(ProgramReport {
                name,
                id: info.id(),
                verified_instructions: info.verified_instruction_count(),
            });
        }
        Ok(reports)
    }

    /// Returns the eBPF object, for tests that run its programs on packets.
    pub fn into_ebpf(self) -> Ebpf {
        self.ebpf
    }
}

/// Pins the maps of an earlier table version that have not changed since: the programs of both
/// versions share them until the earlier ones are detached, so no connection is lost.
fn take_over(pins: &Pins) -> Result<(), LoadError> {
    for (version, new) in map::TAKEN_OVER {
        for name in map::PINNED.into_iter().filter(|name| !new.contains(name)) {
            let (earlier, own) = (pins.map_of_version(version, name), pins.map(name));
            if own.exists() || !earlier.exists() {
                continue;
            }
            let data = MapData::from_pin(&earlier).map_err(|source| OpenError { map: name, source })?;
            data.pin(&own).map_err(|source| LoadError::Pin { map: name, source })?;
            tracing::info!("took over the pinned map {name} of table layout v{version}");
        }
    }
    Ok(())
}

/// The capacities to load with: those of pinned maps, which are kept with their entries, else those
/// configured.
fn effective_capacities(pins: &Pins, capacity: &Capacity) -> (Vec<(&'static str, u32)>, Vec<String>) {
    let mut problems = Vec::new();
    let capacities = capacity.by_map().map(|(name, configured)| {
        // without a readable pin the loader creates a new map, or fails and reports why
        let pinned = MapInfo::from_pin(pins.map(name)).map_or(configured, |info| info.max_entries());
        if pinned != configured && name != map::FLOW_INDEX && name != map::FLOW_BLOCKS {
            problems.push(format!(
                "map {name} keeps its capacity of {pinned} entries because its entries are in use; the configured \
                 capacity of {configured} takes effect after `dataplane-agent cleanup` or a reboot"
            ));
        }
        (name, pinned)
    });
    let mut capacities = capacities.to_vec();
    // one row for each 64 flows, however many there are
    let blocks = FlowBlock::count(capacity_of(&capacities, map::FLOWS));
    capacities.retain(|(name, _)| *name != map::FLOW_BLOCKS);
    capacities.push((map::FLOW_BLOCKS, blocks));
    (capacities, problems)
}

fn capacity_of(capacities: &[(&'static str, u32)], name: &str) -> u32 {
    capacities.iter().find(|(map, _)| *map == name).map_or(0, |(_, capacity)| *capacity)
}

/// The programs to load. Without XDP its program is not loaded, which saves the time of the
/// verifier.
fn used_programs(xdp: XdpUse) -> impl Iterator<Item = &'static str> {
    let xdp = (xdp == XdpUse::Native).then_some(program::XDP_WIRE);
    program::CLASSIFIERS.into_iter().chain(program::SOCKET).chain(xdp)
}

/// Loads these programs one after the other: the verifier uses up to a third of a GiB for a large
/// one (`kernel/bpf/verifier.c`, `explored_states`), and a node with 1 GiB has no memory for
/// several.
fn load_programs(ebpf: &mut Ebpf, names: impl Iterator<Item = &'static str>) -> Result<(), LoadError> {
    for name in names {
        let program = ebpf.program_mut(name).ok_or(LoadError::NoProgram(name))?;
        load_program(program)
            .map_err(|error| LoadError::Program { program: name, reason: load_failure(&error) })?;
    }
    Ok(())
}

/// Loads one program. The verifier gives up with `EAGAIN` when a signal is pending for the thread
/// (`kernel/bpf/verifier.c`, Linux 5.0): such an attempt is repeated, as libbpf does.
///
/// # Errors
/// The error of the last attempt.
pub fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS {
        match try_load(program) {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(LOAD_PAUSE);
            }
            result => return result,
        }
    }
    try_load(program)
}

fn try_load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// The error with the end of the verifier log, which has the reason.
fn load_failure(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return error.to_string();
    };
    format!("{io_error}\n{}", log_tail(&verifier_log.to_string()))
}

fn log_tail(log: &str) -> String {
    let is_reason = |line: &&str| !STATISTICS_PREFIXES.iter().any(|prefix| line.starts_with(prefix));
    let log: String = log.lines().filter(is_reason).flat_map(|line| [line, "\n"]).collect();
    let tail = log.char_indices().rev().nth(LOG_TAIL).map_or(log.as_str(), |(start, _)| &log[start..]);
    tail.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_tail_ends_with_the_reason_not_with_statistics() {
        let mut log = "0: R1=ctx()\n".repeat(1_000);
        log.push_str("invalid access to map value\nverification time 3 usec\nstack depth 0+8\n");
        log.push_str(&"subprog 3 (open) static insns_self 0 insns_total 0 stack 0\n".repeat(100));
        log.push_str("processed 30 insns (limit 1000000)\n");
        let tail = log_tail(&log);
        assert!(tail.ends_with("invalid access to map value"), "{tail}");
        assert!(tail.len() <= LOG_TAIL + 1, "{}", tail.len());
    }
}
