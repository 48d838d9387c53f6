//! The loaded programs, pinned as one set in `<bpffs>/dataplane/v<ABI>/programs/<fingerprint>/`.
//!
//! A set has every program and the map of [`NodeVariables`]. It is pinned in `programs/next` and
//! then renamed, so one with a fingerprint is complete, whenever an agent was stopped. An agent
//! whose fingerprint is that of the pinned set loads nothing: the verifier runs only for programs
//! that it has not seen.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapError, MapInfo},
    pin::PinError,
    programs::{
        CgroupSock, CgroupSockAddr, CgroupSockAddrAttachType as AddrType, CgroupSockAttachType, Program,
        ProgramError, SchedClassifier, Xdp,
    },
};
use aya_obj::programs::XdpAttachType;
use dataplane_common::abi::{
    NodeConfig, NodeVariables,
    names::{self, map, program},
};
use nix::unistd::geteuid;

use super::{
    maps::OpenError,
    pins::{Pins, PinsError},
};

/// Pin of the map [`names::DATA`]: bpffs refuses names with dots.
const VARIABLES: &str = "variables";

/// Why a set of programs could not be pinned or opened.
#[derive(Debug, thiserror::Error)]
pub enum ProgramSetError {
    #[error(transparent)]
    Pins(#[from] PinsError),
    #[error("the loaded object has no {0}")]
    Missing(&'static str),
    #[error("pin {name}: {source}")]
    Pin { name: &'static str, source: PinError },
    #[error("open pinned program {program}: {source}")]
    Open { program: &'static str, source: ProgramError },
    #[error("pinned program {0} is another program, or was loaded by another user")]
    Foreign(&'static str),
    #[error("open the pinned map of the programs' variables: {0}")]
    Variables(#[source] MapError),
}

/// What the programs are made from. Their kernel is the running one: no pin outlives it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProgramSource<'a> {
    pub object: &'a [u8],
    pub node: &'a NodeConfig,
    pub log_level: u8,
    pub programs: &'a [&'static str],
}

impl ProgramSource<'_> {
    /// A hash of the source and of the pinned maps that the programs use.
    ///
    /// # Errors
    ///
    /// One of these maps is not pinned.
    pub(super) fn fingerprint(&self, pins: &Pins) -> Result<u64, OpenError> {
        let Self { object, node, log_level, programs } = self;
        let mut hasher = DefaultHasher::new();
        (object, node, log_level, programs).hash(&mut hasher);
        for name in map::PINNED {
            let info = MapInfo::from_pin(pins.map(name));
            let id = info.map_err(|source| OpenError { map: name, source })?.id();
            (name, id).hash(&mut hasher);
        }
        Ok(hasher.finish())
    }
}

/// The programs of an agent.
#[derive(Debug)]
pub(super) struct ProgramSet {
    programs: BTreeMap<&'static str, Program>,
    variables: Map,
}

impl ProgramSet {
    /// Opens the programs pinned in `directory`.
    ///
    /// # Errors
    ///
    /// A program is missing, has another name or type, or was loaded by another user.
    pub(super) fn open(directory: &Path, programs: &[&'static str]) -> Result<Self, ProgramSetError> {
        let opened = programs.iter().map(|&name| Ok((name, open_program(directory, name)?)));
        let programs = opened.collect::<Result<_, ProgramSetError>>()?;
        let variables = MapData::from_pin(directory.join(VARIABLES)).map_err(ProgramSetError::Variables)?;
        let variables = Map::from_map_data(variables).map_err(ProgramSetError::Variables)?;
        Array::<_, NodeVariables>::try_from(&variables).map_err(ProgramSetError::Variables)?;
        Ok(Self { programs, variables })
    }

    /// Pins the loaded programs as the set with this fingerprint.
    pub(super) fn pin(
        ebpf: &mut Ebpf,
        pins: &Pins,
        fingerprint: u64,
        programs: &[&'static str],
    ) -> Result<(), ProgramSetError> {
        let directory = pins.create_program_set()?;
        for &name in programs {
            let program = ebpf.program_mut(name).ok_or(ProgramSetError::Missing(name))?;
            program.pin(directory.join(name)).map_err(|source| ProgramSetError::Pin { name, source })?;
        }
        let variables = ebpf.map(names::DATA).ok_or(ProgramSetError::Missing(names::DATA))?;
        variables
            .pin(directory.join(VARIABLES))
            .map_err(|source| ProgramSetError::Pin { name: names::DATA, source })?;
        Ok(pins.publish_program_set(fingerprint)?)
    }

    pub(super) fn get(&self, name: &str) -> Option<&Program> {
        self.programs.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Program> {
        self.programs.get_mut(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, &Program)> {
        self.programs.iter().map(|(name, program)| (*name, program))
    }

    pub(super) fn set_variables(&mut self, variables: NodeVariables) -> Result<(), MapError> {
        Array::try_from(&mut self.variables)?.set(0, variables, 0)
    }
}

/// Opens a pinned program. The agent will attach it, so one that another user loaded, or with
/// another name or type, is refused.
fn open_program(directory: &Path, name: &'static str) -> Result<Program, ProgramSetError> {
    let failed = |source| ProgramSetError::Open { program: name, source };
    let program = from_pin(&directory.join(name), name).map_err(failed)?;
    let info = program.info().map_err(failed)?;
    let is_own = info.name() == name.as_bytes()
        && info.program_type() == program.prog_type().into()
        && info.created_by_uid() == Some(geteuid().as_raw());
    if is_own { Ok(program) } else { Err(ProgramSetError::Foreign(name)) }
}

/// The program as its section in the object says.
fn from_pin(pin: &Path, name: &'static str) -> Result<Program, ProgramError> {
    let attach_type = match name {
        "connect4" => AddrType::Connect4,
        "connect6" => AddrType::Connect6,
        "sendmsg4" => AddrType::UDPSendMsg4,
        "sendmsg6" => AddrType::UDPSendMsg6,
        "recvmsg4" => AddrType::UDPRecvMsg4,
        "recvmsg6" => AddrType::UDPRecvMsg6,
        "getpeername4" => AddrType::GetPeerName4,
        "getpeername6" => AddrType::GetPeerName6,
        "release" => {
            return CgroupSock::from_pin(pin, CgroupSockAttachType::SockRelease).map(Program::CgroupSock);
        }
        program::XDP_WIRE => return Xdp::from_pin(pin, XdpAttachType::Interface).map(Program::Xdp),
        _ => return SchedClassifier::from_pin(pin).map(Program::SchedClassifier),
    };
    CgroupSockAddr::from_pin(pin, attach_type).map(Program::CgroupSockAddr)
}
