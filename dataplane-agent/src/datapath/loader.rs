//! Loads the eBPF object: adopts pinned maps or creates them, and loads every program through the
//! verifier, unless the pinned programs are those it would load.
//!
//! Nothing is attached here: if the kernel rejects a program, the programs of the last agent stay
//! attached. Pins keep everything that outlives the agent: dropping [`Datapath`] closes file
//! descriptors and detaches nothing.

use std::{io, path::PathBuf, thread, time::Duration};

use aya::{
    EbpfError, EbpfLoader,
    maps::{MapData, MapError},
    pin::PinError,
    programs::{Program, ProgramError},
};
use dataplane_common::abi::{
    ConnectedPeer, Device, NodeConfig, NodeVariables,
    names::{self, map, program},
};

use super::{
    attach::TcHooks,
    capacity::{Capacities, Capacity},
    generation::ForwardingGeneration,
    kernel_features,
    log::EbpfLog,
    maps::{HashTable, LpmTable, OpenError, Tables},
    pins::{Pins, PinsError},
    ports,
    programs::{ProgramSet, ProgramSetError, ProgramSource},
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
    #[error(transparent)]
    Programs(#[from] ProgramSetError),
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

/// The programs and their maps.
#[derive(Debug)]
pub struct Datapath {
    pub(super) programs: ProgramSet,
    pub(super) pins: Pins,
    pub(super) tc: TcHooks,
    pub(super) xdp: XdpUse,
    generation: ForwardingGeneration,
    problems: Vec<String>,
    adopted: u32,
    reused: bool,
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
    /// Opens the pinned programs if they are those of this object and configuration, else loads
    /// every program, with pinned maps of an earlier agent or new ones.
    pub fn load(config: &DatapathConfig) -> Result<Self, LoadError> {
        Self::load_object(OBJECT, config)
    }

    /// Loads an object other than the embedded one.
    pub fn load_object(object: &[u8], config: &DatapathConfig) -> Result<Self, LoadError> {
        let pins = Pins::new(&config.bpffs);
        pins.prepare()?;
        take_over(&pins)?;
        let adopted = map::PINNED.iter().filter(|name| pins.map(name).exists()).count() as u32;
        let capacities = Capacities::effective(&pins, &config.capacity);
        let node = NodeConfig {
            flow_slots: capacities.of(map::FLOWS),
            flags: config.node.flags | kernel_features::flags(),
            ..config.node
        };
        let programs: Vec<_> = used_programs(config.xdp).collect();
        let source =
            ProgramSource { object, node: &node, log_level: config.log.number(), programs: &programs };
        let pinned = pinned_programs(&source, &pins)?;
        let reused = pinned.is_some();
        let programs = match pinned {
            Some(programs) => programs,
            None => load_programs(&source, &capacities, &pins)?,
        };
        ports::prepare(&pins)?;
        let generation = ForwardingGeneration::open(&pins)?;
        let problems = capacities.into_problems();
        Ok(Self { programs, pins, tc: config.tc, xdp: config.xdp, generation, problems, adopted, reused })
    }

    /// What the operator should know: pinned maps whose capacity differs from the configuration.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Number of tables of an earlier agent that it has adopted.
    pub const fn adopted(&self) -> u32 {
        self.adopted
    }

    /// Whether the programs are those that an earlier agent loaded.
    pub const fn reuses_programs(&self) -> bool {
        self.reused
    }

    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Sets the node's variables in the programs, including those already attached.
    ///
    /// The write is not atomic: a packet that is masqueraded at the same time may get a mix of the
    /// old and the new address.
    pub fn set_variables(&mut self, variables: NodeVariables) -> Result<(), LoadError> {
        self.programs
            .set_variables(variables)
            .map_err(|source| LoadError::Fill { map: names::DATA, source })?;
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
        let report = |(name, program): (_, &Program)| {
            let info = program.info()?;
            Ok(ProgramReport {
                name,
                id: info.id(),
                verified_instructions: info.verified_instruction_count(),
            })
        };
        self.programs.iter().map(report).collect()
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

/// The programs to load. Without XDP its program is not loaded, which saves the time of the
/// verifier.
fn used_programs(xdp: XdpUse) -> impl Iterator<Item = &'static str> {
    let xdp = (xdp == XdpUse::Native).then_some(program::XDP_WIRE);
    program::CLASSIFIERS.into_iter().chain(program::SOCKET).chain(xdp)
}

/// The pinned programs, if they were made from this source. Removes all others.
fn pinned_programs(source: &ProgramSource<'_>, pins: &Pins) -> Result<Option<ProgramSet>, LoadError> {
    // a map is missing: there are no programs that use it
    let Ok(fingerprint) = source.fingerprint(pins) else { return Ok(None) };
    let directory = pins.program_set(fingerprint);
    if !directory.exists() {
        return Ok(None);
    }
    match ProgramSet::open(&directory, source.programs) {
        Ok(programs) => {
            pins.remove_other_program_sets(fingerprint)?;
            Ok(Some(programs))
        }
        Err(error) => {
            tracing::warn!(%error, "cannot use the pinned programs, loading them again");
            Ok(None)
        }
    }
}

/// Loads the programs and pins them, one after the other: the verifier needs memory for each, and
/// a small node has none for several.
fn load_programs(
    source: &ProgramSource<'_>,
    capacities: &Capacities,
    pins: &Pins,
) -> Result<ProgramSet, LoadError> {
    let mut loader = EbpfLoader::new();
    loader.override_global(names::NODE, source.node, true);
    // an object without log calls does not have this symbol
    loader.override_global(aya_log::LEVEL, &source.log_level, false);
    for (name, entries) in capacities.iter() {
        loader.map_max_entries(name, entries);
    }
    loader.map_max_entries(map::FLOW_NEXT_HOPS, capacities.of(map::FLOWS).saturating_mul(2));
    for name in map::PINNED {
        loader.map_pin_path(name, pins.map(name));
    }
    let mut ebpf = loader.load(source.object).map_err(LoadError::Object)?;
    // before the programs are loaded: the verifier's error about a map of another layout is harder
    // to read
    Tables::open(pins)?;
    HashTable::<u32, Device>::open(pins, map::DEVICES)?;
    LpmTable::<AllowedPrefix, u32>::open(pins, map::ALLOWED_SOURCES)?;
    for &name in source.programs {
        let program = ebpf.program_mut(name).ok_or(LoadError::NoProgram(name))?;
        load_program(program)
            .map_err(|error| LoadError::Program { program: name, reason: load_failure(&error) })?;
    }
    let fingerprint = source.fingerprint(pins)?;
    ProgramSet::pin(&mut ebpf, pins, fingerprint, source.programs)?;
    pins.remove_other_program_sets(fingerprint)?;
    Ok(ProgramSet::open(&pins.program_set(fingerprint), source.programs)?)
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
