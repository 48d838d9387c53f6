//! The compiler of the image's programs: rustc with options that only our crates get.
//!
//! Cargo has no such options: `RUSTFLAGS` apply to all crates, and every dependency would be
//! compiled a second time. So cargo runs this program in place of rustc for the workspace's crates
//! (`RUSTC_WORKSPACE_WRAPPER`), as clippy does it.

use std::{
    env,
    ffi::OsString,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};

use crate::process;

/// Set by [`configure`] for the processes that cargo starts.
const IS_RUSTC: &str = "DATAPLANE_XTASK_IS_RUSTC";

/// Static linking, no debug information. Cargo does not see these options: after a change of them,
/// what is compiled already must be removed.
const OPTIONS: [&str; 3] = ["-Ctarget-feature=+crt-static", "-Cdebuginfo=0", "-Cstrip=debuginfo"];

/// Makes cargo run this program as rustc.
pub(super) fn configure(cargo: &mut Command) -> Result<()> {
    let program = env::current_exe().context("find the running executable")?;
    cargo.env("RUSTC_WORKSPACE_WRAPPER", program).env(IS_RUSTC, "1");
    Ok(())
}

/// Whether cargo runs this process as rustc.
pub(crate) fn is_requested() -> bool {
    env::var_os(IS_RUSTC).is_some()
}

/// Becomes rustc. The arguments are its path and what cargo passes to it.
pub(crate) fn run() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let Some(rustc) = arguments.next() else { return ExitCode::FAILURE };
    let arguments: Vec<OsString> = arguments.collect();
    let mut command = Command::new(rustc);
    command.args(&arguments);
    // cargo also asks for the version and the target's properties, which the options would change
    if arguments.iter().any(|argument| Path::new(argument).extension().is_some_and(|name| name == "rs")) {
        command.args(OPTIONS);
    }
    eprintln!("error: {:#}", process::become_program(&mut command));
    ExitCode::FAILURE
}
