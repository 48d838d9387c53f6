//! The verifier's budget: what it walked for each program, under a ceiling that is raised only on purpose.
//!
//! The kernel refuses a program at 1,000,000 instructions; other kernels walk more than this one (`docs/kernels.md`), so
//! the ceilings leave them room.

use anyhow::{Context as _, Result};
use aya::{EbpfLoader, programs::Program};
use dataplane_common::abi::names::{NODE, program};
use dataplane_testkit::prog::node_config;

/// Program and ceiling.
const CEILINGS: [(&str, u32); 16] = [
    (program::FROM_POD, 450_000),
    (program::TO_POD, 90_000),
    (program::FROM_WIRE, 450_000),
    (program::TO_WIRE, 300_000),
    (program::FROM_OVERLAY, 450_000),
    (program::TO_OVERLAY, 90_000),
    (program::XDP_WIRE, 100_000),
    ("connect4", 20_000),
    ("connect6", 50_000),
    ("sendmsg4", 20_000),
    ("sendmsg6", 50_000),
    ("recvmsg4", 1_000),
    ("recvmsg6", 1_000),
    ("getpeername4", 500),
    ("getpeername6", 500),
    ("release", 200),
];

#[test]
fn every_program_stays_under_its_ceiling() -> Result<()> {
    // logging off, as shipped, and at its most talkative
    for level in [0_u8, 5] {
        let mut ebpf = EbpfLoader::new()
            .override_global(NODE, &node_config(), true)
            .override_global("AYA_LOG_LEVEL", &level, false)
            .load(dataplane_agent::datapath::OBJECT)?;
        println!("log level {level}");
        let mut over = Vec::new();
        for (name, ceiling) in CEILINGS {
            let program = ebpf.program_mut(name).context(name)?;
            match program {
                Program::SchedClassifier(program) => program.load(),
                Program::CgroupSockAddr(program) => program.load(),
                Program::Xdp(program) => program.load(),
                Program::CgroupSock(program) => program.load(),
                _ => anyhow::bail!("{name} is of an unexpected type"),
            }
            .with_context(|| format!("load {name}"))?;
            // that it passes is something: an earlier kernel does not tell what it walked
            let Some(walked) = program.info()?.verified_instruction_count() else {
                println!("{name:>14} passes");
                continue;
            };
            println!("{name:>14} {walked:>8} of {ceiling:>8}");
            if walked > ceiling {
                over.push((name, walked, ceiling));
            }
        }
        assert!(over.is_empty(), "over their ceilings: {over:?}");
    }
    Ok(())
}

#[test]
fn every_program_has_a_ceiling() {
    let with: Vec<_> = CEILINGS.iter().map(|(name, _)| *name).collect();
    let all: Vec<_> = program::DEVICE.into_iter().chain(program::SOCKET).collect();
    assert_eq!(with, all);
}
