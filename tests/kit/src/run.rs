//! What `cargo xtask test` and a test tell each other: how much is to run, and lines that it reads.

use std::env;

/// Whether `cargo xtask test --full` runs: long tests, and long tables whole.
pub fn is_full() -> bool {
    env::var("DATAPLANE_FULL").is_ok_and(|value| value == "1")
}

/// Whether root runs the test.
pub fn is_root() -> bool {
    nix::unistd::Uid::effective().is_root()
}

/// Says that a test does nothing here; it is counted as skipped, not as passed.
#[expect(clippy::print_stdout, reason = "the line is read")]
pub fn skip(reason: &str) {
    println!("SKIP: {reason}");
}

/// Says something that stands at the end of the run.
#[expect(clippy::print_stdout, reason = "the line is read")]
pub fn summarize(text: &str) {
    println!("SUMMARY: {text}");
}

/// Ends a test that takes long, as skipped, unless such tests are to run.
#[macro_export]
macro_rules! only_in_full {
    () => {
        if !$crate::run::is_full() {
            $crate::run::skip("runs with `cargo xtask test --full`");
            return Ok(());
        }
    };
}

/// Ends a test that makes network namespaces, as skipped, unless root runs it.
#[macro_export]
macro_rules! only_as_root {
    () => {
        if !$crate::run::is_root() {
            $crate::run::skip("a network namespace needs root");
            return Ok(());
        }
    };
}
