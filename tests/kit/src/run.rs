//! The interface between a test and `cargo xtask test`: environment variables it sets, and output
//! lines it reads.

use std::env;

/// Whether `cargo xtask test --full` runs: with the long tests and complete tables.
pub fn is_full() -> bool {
    env::var("DATAPLANE_FULL").is_ok_and(|value| value == "1")
}

/// Whether root runs the test.
pub fn is_root() -> bool {
    nix::unistd::Uid::effective().is_root()
}

/// Reports that a test cannot run here. It is counted as skipped, not as passed.
#[expect(clippy::print_stdout, reason = "the test runner reads the line")]
pub fn skip(reason: &str) {
    println!("SKIP: {reason}");
}

/// Reports a line for the summary at the end of the run.
#[expect(clippy::print_stdout, reason = "the test runner reads the line")]
pub fn summarize(text: &str) {
    println!("SUMMARY: {text}");
}

/// Returns from a long test, as skipped, unless `cargo xtask test --full` runs.
#[macro_export]
macro_rules! only_in_full {
    () => {
        if !$crate::run::is_full() {
            $crate::run::skip("runs with `cargo xtask test --full`");
            return Ok(());
        }
    };
}

/// Returns from a test that creates network namespaces, as skipped, unless root runs it.
#[macro_export]
macro_rules! only_as_root {
    () => {
        if !$crate::run::is_root() {
            $crate::run::skip("creating a network namespace needs root");
            return Ok(());
        }
    };
}
