//! Loads every program separately, so that one rejection does not hide another.

use anyhow::{Context as _, Result, bail};
use aya::{
    EbpfLoader,
    programs::{Program, ProgramError},
};
use dataplane_common::abi::names::{NODE, program};

use super::{Finding, Findings};
use dataplane_testkit::prog::node_config;

/// Characters of the verifier log to report; the end has the reason.
const LOG_TAIL: usize = 2_000;

/// Loads every program as released: every feature enabled, logging off.
pub(crate) fn programs(findings: &mut Findings) -> Result<()> {
    let mut ebpf = EbpfLoader::new()
        .override_global(NODE, &node_config(), true)
        .override_global("AYA_LOG_LEVEL", &0_u8, false)
        .load(dataplane_agent::datapath::OBJECT)
        .context("load the object's maps")?;
    for name in program::DEVICE.into_iter().chain(program::SOCKET) {
        findings.report(&finding(name, ebpf.program_mut(name).context(name)?)?)?;
    }
    Ok(())
}

fn finding(name: &'static str, program: &mut Program) -> Result<Finding> {
    let loaded = match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => bail!("{name} is of an unexpected type"),
    };
    if let Err(error) = loaded {
        return Ok(Finding::Program { name, verified: None, refused: Some(reason(&error)) });
    }
    let verified = program.info()?.verified_instruction_count();
    Ok(Finding::Program { name, verified, refused: None })
}

fn reason(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else { return error.to_string() };
    let log = verifier_log.to_string();
    let tail = log.char_indices().rev().nth(LOG_TAIL).map_or(log.as_str(), |(start, _)| &log[start..]);
    format!("{io_error}: {}", tail.trim())
}
