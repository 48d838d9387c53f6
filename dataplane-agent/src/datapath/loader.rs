//! Puts the object into the kernel: maps adopted from pins or made anew, every program loaded and verified.
//!
//! Nothing is attached here, so a kernel that rejects a program leaves the programs of the last agent at work.
//! What survives the agent is held by pins: dropping [`Datapath`] closes file descriptors and detaches nothing.

use std::path::PathBuf;

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, MapData, MapError, MapInfo, Queue},
    pin::PinError,
    programs::{Program, ProgramError},
};
use dataplane_common::abi::{
    ConnectedPeer, NodeAddresses, NodeConfig,
    names::{self, capacity, map, program},
};

use super::{
    attach::TcHooks,
    log::EbpfLog,
    maps::{HashTable, OpenError, Tables},
    pins::{Pins, PinsError},
    xdp::XdpUse,
};

/// The object `build.rs` made of the crate `dataplane-ebpf`.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dataplane"));

/// Characters of the verifier's log that go into an error: its end says why.
const LOG_TAIL: usize = 1_500;
/// How lines begin that the verifier adds after that end, with its statistics. Linux 7 has one for every function.
const STATISTICS: [&str; 4] = ["verification time", "stack depth", "subprog ", "processed "];

/// Why the datapath is not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Pins(#[from] PinsError),
    #[error("load the eBPF object: {0}")]
    Object(#[source] EbpfError),
    #[error("the eBPF object has no program {0}")]
    NoProgram(&'static str),
    #[error("the kernel refused program {program}: {reason}")]
    Program { program: &'static str, reason: String },
    #[error("fill map {map}: {source}")]
    Fill { map: &'static str, source: MapError },
    #[error("pin map {map}: {source}")]
    Pin { map: &'static str, source: PinError },
    #[error("{0} (left by an incompatible build? `dataplane-agent cleanup` removes it)")]
    Open(#[from] OpenError),
}

/// What is loaded, and how.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Where the BPF file system is, or is to be mounted.
    pub bpffs: PathBuf,
    /// Constants of the programs. `flow_slots` is set by the loader.
    pub node: NodeConfig,
    pub capacity: Capacity,
    pub log: EbpfLog,
    pub tc: TcHooks,
    pub xdp: XdpUse,
}

/// Entries of the maps whose size is the operator's choice.
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
    /// Of the ring buffer, a power of two.
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
            (map::FLOW_SLOTS, self.flows),
            // one entry per direction
            (map::FLOW_INDEX, self.flows.saturating_mul(2)),
            (map::FRAGMENTS, self.fragments),
            (map::DATAGRAM_ORIGINS, self.datagram_origins),
            (map::SOURCE_RANGES, self.source_ranges),
            (map::AFFINITY, self.affinity),
            (map::EVENTS, self.events_bytes),
        ]
    }
}

/// The loaded programs.
#[derive(Debug)]
pub struct Datapath {
    pub(super) ebpf: Ebpf,
    pub(super) pins: Pins,
    pub(super) tc: TcHooks,
    pub(super) xdp: XdpUse,
    problems: Vec<String>,
}

/// A loaded program, for people.
#[derive(Clone, Debug)]
pub struct ProgramReport {
    pub name: &'static str,
    pub id: u32,
    /// Instructions the verifier walked; the kernel tells from 5.16.
    pub verified_instructions: Option<u32>,
}

impl Datapath {
    /// Loads every program, with the maps an earlier agent pinned or new ones.
    pub fn load(config: &DatapathConfig) -> Result<Self, LoadError> {
        Self::load_object(OBJECT, config)
    }

    /// Loads another object than the embedded one.
    pub fn load_object(object: &[u8], config: &DatapathConfig) -> Result<Self, LoadError> {
        let pins = Pins::new(&config.bpffs);
        pins.prepare()?;
        let (sizes, problems) = adopt_sizes(&pins, &config.capacity);
        let mut node = config.node;
        node.flow_slots = size_of_map(&sizes, map::FLOWS);

        let level = config.log.number();
        let mut loader = EbpfLoader::new();
        loader.override_global(names::NODE, &node, true);
        // an object without a log statement has no such symbol
        loader.override_global(aya_log::LEVEL, &level, false);
        for (name, entries) in sizes {
            loader.map_max_entries(name, entries);
        }
        let new_slots = !pins.map(map::FLOW_SLOTS).exists();
        for name in map::PINNED {
            if name != map::FLOW_SLOTS || !new_slots {
                loader.map_pin_path(name, pins.map(name));
            }
        }
        let mut ebpf = loader.load(object).map_err(LoadError::Object)?;
        if new_slots {
            fill_slots(&mut ebpf, &pins, node.flow_slots)?;
        }
        // before the verifier runs, whose complaint about a map of another layout would be harder to read
        Tables::open(&pins)?;
        load_programs(&mut ebpf, used_programs(config.xdp))?;
        Ok(Self { ebpf, pins, tc: config.tc, xdp: config.xdp, problems })
    }

    /// What an operator should know of this load: pins that were kept although the configuration differs.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Tells the programs what their node's addresses are, those that run already included.
    ///
    /// A packet that is masqueraded in this very moment may get an address made of two: its reply does not come.
    pub fn set_addresses(&mut self, addresses: NodeAddresses) -> Result<(), LoadError> {
        let failed = |source| LoadError::Fill { map: names::DATA, source };
        let missing = || MapError::InvalidName { name: names::DATA.to_owned() };
        let map = self.ebpf.map_mut(names::DATA).ok_or_else(|| failed(missing()))?;
        let mut data: Array<&mut MapData, NodeAddresses> = Array::try_from(map).map_err(failed)?;
        data.set(0, addresses, 0).map_err(failed)
    }

    /// Opens the tables. Each call opens them anew: several holders may have them.
    pub fn tables(&self) -> Result<Tables, OpenError> {
        Tables::open(&self.pins)
    }

    /// The backends of connected UDP sockets, by the number of the socket.
    pub fn connected_peers(&self) -> Result<HashTable<u64, ConnectedPeer>, OpenError> {
        HashTable::open(&self.pins, map::CONNECTED_PEERS)
    }

    /// Every program as the kernel sees it.
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

    /// Gives up the eBPF object, for a test that runs its programs on packets.
    pub fn into_ebpf(self) -> Ebpf {
        self.ebpf
    }
}

/// The capacities to load with: those of existing pins, which are kept with all they hold, else those configured.
fn adopt_sizes(pins: &Pins, capacity: &Capacity) -> (Vec<(&'static str, u32)>, Vec<String>) {
    let mut problems = Vec::new();
    let sizes = capacity.by_map().map(|(name, wanted)| {
        // no pin, or none that can be read: the loader makes a new map, or fails and says why
        let pinned = MapInfo::from_pin(pins.map(name)).map_or(wanted, |info| info.max_entries());
        if pinned != wanted && name != map::FLOW_INDEX && name != map::FLOW_SLOTS {
            problems.push(format!(
                "map {name} keeps its capacity of {pinned} entries, {wanted} are configured: its entries are in \
                 use; a new capacity takes effect after `dataplane-agent cleanup` or a reboot"
            ));
        }
        (name, pinned)
    });
    (sizes.to_vec(), problems)
}

fn size_of_map(sizes: &[(&'static str, u32)], name: &str) -> u32 {
    sizes.iter().find(|(map, _)| *map == name).map_or(0, |(_, size)| *size)
}

/// Puts every slot of the flow table into the queue, and only then pins it: an agent that dies in between leaves no
/// half-filled queue for the next one to adopt.
fn fill_slots(ebpf: &mut Ebpf, pins: &Pins, slots: u32) -> Result<(), LoadError> {
    const MAP: &str = map::FLOW_SLOTS;
    let failed = |source| LoadError::Fill { map: MAP, source };
    let Some(map) = ebpf.map_mut(MAP) else {
        return Err(failed(MapError::InvalidName { name: MAP.to_owned() }));
    };
    let mut queue: Queue<&mut MapData, u32> = Queue::try_from(map).map_err(failed)?;
    for slot in 0..slots {
        queue.push(slot, 0).map_err(failed)?;
    }
    let Some(map) = ebpf.map(MAP) else {
        return Err(failed(MapError::InvalidName { name: MAP.to_owned() }));
    };
    map.pin(pins.map(MAP)).map_err(|source| LoadError::Pin { map: MAP, source })
}

/// Programs of a node. Who does not use the driver's need not wait for the verifier.
fn used_programs(xdp: XdpUse) -> impl Iterator<Item = &'static str> {
    let xdp = (xdp == XdpUse::Native).then_some(program::XDP_WIRE);
    program::CLASSIFIERS.into_iter().chain(program::SOCKET).chain(xdp)
}

/// Has the kernel verify these programs, one after the other: while it is at a large one, it takes a third of a GiB for what it has
/// seen (`kernel/bpf/verifier.c`, `explored_states`), and a node of 1 GiB has no more to give.
fn load_programs(ebpf: &mut Ebpf, names: impl Iterator<Item = &'static str>) -> Result<(), LoadError> {
    for name in names {
        let program = ebpf.program_mut(name).ok_or(LoadError::NoProgram(name))?;
        load_program(program)
            .map_err(|error| LoadError::Program { program: name, reason: reason(&error) })?;
    }
    Ok(())
}

fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// The error with the end of the verifier's log, which is where it says why.
fn reason(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return error.to_string();
    };
    format!("{io_error}\n{}", tail(&verifier_log.to_string()))
}

fn tail(log: &str) -> String {
    let says_why = |line: &&str| !STATISTICS.iter().any(|statistics| line.starts_with(statistics));
    let log: String = log.lines().filter(says_why).flat_map(|line| [line, "\n"]).collect();
    let tail = log.char_indices().rev().nth(LOG_TAIL).map_or(log.as_str(), |(start, _)| &log[start..]);
    tail.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_verifiers_log_is_its_reason_and_not_its_statistics() {
        let mut log = "0: R1=ctx()\n".repeat(1_000);
        log.push_str("invalid access to map value\nverification time 3 usec\nstack depth 0+8\n");
        log.push_str(&"subprog 3 (open) static insns_self 0 insns_total 0 stack 0\n".repeat(100));
        log.push_str("processed 30 insns (limit 1000000)\n");
        let tail = tail(&log);
        assert!(tail.ends_with("invalid access to map value"), "{tail}");
        assert!(tail.len() <= LOG_TAIL + 1, "{}", tail.len());
    }
}
