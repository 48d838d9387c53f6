//! `test`: builds all tests of the workspace at once and runs them.
//!
//! Test binaries run in parallel, except those with clusters of namespaces: they measure time, and
//! run one module after the other. A test that cannot run on this machine prints `SKIP: <reason>`
//! and is counted as skipped, not as passed.

pub(crate) mod binaries;
pub(crate) mod libtest;
pub(crate) mod runner;

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Result, bail};

use self::{binaries::Binary, libtest::Report, runner::Extent};
use crate::{
    process,
    setup::{self, Task},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose `binary::test` contains this text
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Run all cases of long tables, not a sample
    #[arg(long)]
    full: bool,
}

/// Compiles the tests.
pub(crate) fn build() -> Result<()> {
    setup::ensure(&[Task::Build])?;
    binaries::build().map(drop)
}

pub(crate) fn run(arguments: &Args) -> Result<()> {
    setup::ensure(&[Task::Build, Task::Run])?;
    let (start, cpu) = (Instant::now(), process::cpu_of_children());
    let mut binaries = binaries::build()?;
    let cpu = process::cpu_of_children().saturating_sub(cpu);
    eprintln!("tests are compiled: {:.0?}, {cpu:.0?} of CPU time", start.elapsed());
    let filter = arguments.filter.as_deref();
    if let Some(filter) = filter {
        binaries = runner::select(binaries, filter)?;
    }
    let start = Instant::now();
    let (alone, together): (VecDeque<Binary>, VecDeque<Binary>) =
        binaries.into_iter().partition(|binary| binary.runs_alone);
    let mut reports = Vec::new();
    let extent = if arguments.full { Extent::Full } else { Extent::Sample };
    run_all(together, thread::available_parallelism()?.get(), extent, &mut reports)?;
    for binary in &alone {
        run_all(runner::by_module(binary)?.into(), 1, extent, &mut reports)?;
    }
    if filter.is_none() {
        reports.push(runner::run_doc_tests()?);
    }
    summarize(&reports, start)
}

/// Runs binaries, `workers` at a time.
fn run_all(queue: VecDeque<Binary>, workers: usize, extent: Extent, reports: &mut Vec<Report>) -> Result<()> {
    let queue = Mutex::new(queue);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let work = || -> Result<Vec<Report>> {
        std::iter::from_fn(next).map(|binary| runner::run(&binary, extent)).collect()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            reports.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(())
    })
}

/// The API server of the cluster tests, chosen as they choose it.
fn api_server() -> String {
    match std::env::var("KUBEBUILDER_ASSETS").ok().filter(|directory| !directory.is_empty()) {
        Some(directory) => format!("with the kube-apiserver in {directory}"),
        None => "with the API server of the tests (KUBEBUILDER_ASSETS names a real one)".to_owned(),
    }
}

/// Prints failed tests (their output is printed when they end), skipped tests with reasons, and the
/// counts as the last line.
fn summarize(reports: &[Report], start: Instant) -> Result<()> {
    for failure in reports.iter().flat_map(|report| &report.failures) {
        println!("FAILED {}", failure.test);
    }
    let skips: Vec<_> = reports.iter().flat_map(|report| &report.skips).collect();
    if !skips.is_empty() {
        println!("\nskipped:");
        for skip in &skips {
            println!("  {}: {}", skip.test, skip.reason);
        }
    }
    let summaries: Vec<_> = reports.iter().flat_map(|report| &report.summaries).collect();
    if !summaries.is_empty() {
        println!();
        for summary in summaries {
            println!("{summary}");
        }
    }
    let failed: usize = reports.iter().map(|report| report.failures.len()).sum();
    let passed: usize = reports.iter().map(|report| report.passed).sum();
    println!("\nran for {:.0?}, {}", start.elapsed(), api_server());
    println!("{passed} passed, {failed} failed, {} skipped", skips.len());
    if failed > 0 {
        bail!("{failed} tests failed");
    }
    Ok(())
}
