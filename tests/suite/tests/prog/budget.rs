//! The verifier's budget: the number of instructions it processes for each program, with a ceiling
//! that is raised only deliberately.
//!
//! The kernel rejects a program at 1,000,000 instructions. Other kernels process more than this one
//! (`docs/kernels.md`); the ceilings leave room for that.

use anyhow::{Context as _, Result};
use aya::EbpfLoader;
use dataplane_agent::datapath::loader;
use dataplane_common::abi::{
    NodeConfig,
    names::{NODE, capacity, program},
};
use dataplane_testkit::prog::node_config;

/// Program, its ceiling without logging, as released, and with the most logging.
const CEILINGS: [(&str, [u32; 2]); 19] = [
    (program::FROM_POD, [100_000, 180_000]),
    (program::TO_POD, [20_000, 30_000]),
    (program::FROM_WIRE, [105_000, 180_000]),
    (program::TO_WIRE, [90_000, 150_000]),
    (program::FROM_OVERLAY, [105_000, 180_000]),
    (program::TO_OVERLAY, [20_000, 30_000]),
    (program::XDP_WIRE, [75_000, 90_000]),
    (program::FROM_L3, [200, 5_000]),
    (program::TO_L3, [200, 5_000]),
    (program::LEAVE_L3, [50, 50]),
    ("connect4", [20_000, 20_000]),
    ("connect6", [50_000, 50_000]),
    ("sendmsg4", [20_000, 20_000]),
    ("sendmsg6", [50_000, 50_000]),
    ("recvmsg4", [1_000, 1_000]),
    ("recvmsg6", [1_000, 1_000]),
    ("getpeername4", [500, 500]),
    ("getpeername6", [500, 500]),
    ("release", [200, 200]),
];

#[test]
fn every_program_stays_under_its_ceiling() -> Result<()> {
    let node = NodeConfig { flow_slots: capacity::FLOWS, ..node_config() };
    for (column, level) in [0_u8, 5].into_iter().enumerate() {
        let mut ebpf = EbpfLoader::new()
            .override_global(NODE, &node, true)
            .override_global("AYA_LOG_LEVEL", &level, false)
            .load(dataplane_agent::datapath::OBJECT)?;
        println!("log level {level}");
        let mut over = Vec::new();
        for (name, ceilings) in CEILINGS {
            let ceiling = ceilings[column];
            let program = ebpf.program_mut(name).context(name)?;
            loader::load_program(program).with_context(|| format!("load {name}"))?;
            // before Linux 5.16 the number is unknown: loading is the check
            let Some(processed) = program.info()?.verified_instruction_count() else {
                println!("{name:>14} passes");
                continue;
            };
            println!("{name:>14} {processed:>8} of {ceiling:>8}");
            if processed > ceiling {
                over.push((name, processed, ceiling));
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
