//! Finds out what the running kernel makes of the datapath; `cargo xtask kernels` runs it in QEMU. Needs root.

use std::process::ExitCode;

use anyhow::Result;
use dataplane_tests::kernel;

fn main() -> Result<ExitCode> {
    let mut is_fine = true;
    // one after the other: what is found out is told even if the next cannot be
    for look in [kernel::kernel, kernel::programs, kernel::hooks] {
        for finding in look()? {
            kernel::tell(&finding)?;
            is_fine &= finding.is_fine();
        }
    }
    Ok(if is_fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
