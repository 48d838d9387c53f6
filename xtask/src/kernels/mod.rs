//! `kernels`: tests the datapath on other kernels. Each is a package of Debian that boots in QEMU.
//!
//! In the guest, `dataplane-kernel-check` loads and attaches all programs, then the test binaries
//! run. Results are read from the guest's console, which stays in
//! `target/kernels/<version>/console.log`.

mod console;
mod guest;
mod image;
mod packages;
mod report;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use self::{console::Outcome, image::Step};
use crate::{
    setup::{self, Task},
    test::{
        binaries::{self, Binary},
        runner,
    },
    workspace,
};

/// Kernels without `--kernel`: the oldest supported one, two of current distributions, and the
/// newest.
const DEFAULT: [&str; 4] = ["5.10", "6.1", "6.12", packages::NEWEST];
const DOCUMENT: &str = "docs/kernels.md";
/// The steps that are not test binaries: loading and attaching, and traffic.
const CHECKS: [&str; 2] = ["programs", "traffic"];
/// For cargo: the program of these steps.
const CHECK_ONLY: [&str; 2] = ["--bin", CHECK_PROGRAM];
const CHECK_PROGRAM: &str = "dataplane-kernel-check";
/// For cargo: that program, the programs that it starts, and the tests that depend on the kernel.
const ALL: [&str; 5] = ["--bins", "--test", "integration", "--test", "prog"];
/// Modules of the agent's tests that depend on the kernel; all other tests do.
const OF_AGENT: [&str; 2] = ["datapath", "netlink"];
const AGENT: &str = "dataplane-agent/integration";
/// Time limits. Without hardware virtualisation the verifier is 30 times slower, and each mode of
/// traffic loads the programs of two agents.
const CHECK_SECONDS: u32 = 3_600;
const SUITE_SECONDS: u32 = 900;
const BOOT_SECONDS: u32 = 120;

/// Programs that the steps start.
const COMPANIONS: [&str; 3] = ["dataplane-agent", "dataplane-cni", "dataplane-traffic"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Kernel version, as `6.12` or `newest` (repeatable) [default: 5.10, 6.1, 6.12, newest]
    #[arg(long = "kernel", value_name = "VERSION")]
    kernels: Vec<String>,
    /// Load and attach only; run no tests
    #[arg(long)]
    quick: bool,
    /// Besides loading, run only steps whose name contains this text (repeatable)
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Download the kernels again, which may be newer now
    #[arg(long)]
    update: bool,
    /// Number of kernels that run at the same time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

pub(crate) fn run(arguments: Args) -> Result<()> {
    let is_default = arguments.kernels.is_empty();
    let names = if is_default { DEFAULT.map(str::to_owned).to_vec() } else { arguments.kernels };
    setup::ensure(&[Task::Build, Task::Run, Task::Kernels])?;
    let binaries = binaries::build_selected(if arguments.quick { &CHECK_ONLY } else { &ALL })?;
    let programs = workspace::development_programs()?;
    let mut parts = Vec::new();
    for binary in &binaries {
        parts.extend(runner::by_module(binary)?);
    }
    parts.retain(|part| {
        part.name != AGENT || part.module.as_deref().is_some_and(|module| OF_AGENT.contains(&module))
    });
    let mut steps = steps(&programs, &parts, arguments.quick);
    let is_whole = is_default && !arguments.quick && arguments.only.is_empty();
    if !arguments.only.is_empty() {
        steps.retain(|step| {
            step.name == CHECKS[0] || arguments.only.iter().any(|text| step.name.contains(text))
        });
    }
    let companions: &[&str] = if arguments.quick { &[] } else { &COMPANIONS };
    let companions: Vec<PathBuf> = companions.iter().map(|name| programs.join(name)).collect();
    let directory = programs.parent().context("the programs' path has no parent directory")?.join("kernels");
    let mut kernels = Vec::new();
    for name in &names {
        kernels.push(packages::kernel(&directory, name, arguments.update)?);
    }

    let queue = Mutex::new(kernels.iter().enumerate());
    let outcomes = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..arguments.jobs.max(1))
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while let Some((place, kernel)) = next(&queue) {
                        let outcome = boot(kernel, &steps, &companions, &directory.join(&kernel.name))?;
                        outcomes.lock().expect("no worker panics").push((
                            place,
                            kernel.name.clone(),
                            outcome,
                        ));
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no worker panics"))
    })?;
    let mut outcomes = outcomes.into_inner().expect("no worker panics");
    outcomes.sort_by_key(|(place, _, _)| *place);
    let rows: Vec<report::Row> = outcomes.into_iter().map(|(_, name, outcome)| (name, outcome)).collect();
    finish(&rows, is_whole)
}

fn next<T>(queue: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    queue.lock().expect("no worker panics").next()
}

/// The steps of a guest, in order.
fn steps(programs: &Path, binaries: &[Binary], is_quick: bool) -> Vec<Step> {
    let checks = CHECKS.iter().take(if is_quick { 1 } else { CHECKS.len() }).map(|what| Step {
        name: (*what).to_owned(),
        executable: programs.join(CHECK_PROGRAM),
        arguments: (*what).to_owned(),
        seconds: CHECK_SECONDS,
    });
    let suites = binaries.iter().map(|binary| Step {
        name: binary.label(),
        executable: binary.executable.clone(),
        arguments: arguments(binary),
        seconds: SUITE_SECONDS,
    });
    checks.chain(suites).collect()
}

fn arguments(binary: &Binary) -> String {
    let all = "--test-threads=1 --show-output";
    binary.only.as_ref().map_or_else(|| all.to_owned(), |only| format!("{all} --exact {}", only.join(" ")))
}

/// Runs the steps on a kernel. A failure in the guest is part of the outcome, not an error.
fn boot(
    kernel: &packages::Kernel,
    steps: &[Step],
    companions: &[PathBuf],
    directory: &Path,
) -> Result<Outcome> {
    let file = directory.join("initramfs");
    image::write(kernel, steps, companions, &directory.join("tree"), &file)?;
    let log = directory.join("console.log");
    let limit = BOOT_SECONDS + steps.iter().map(|step| step.seconds).sum::<u32>();
    eprintln!("kernels: {}: booting, console in {}", kernel.name, log.display());
    let start = Instant::now();
    let in_time = guest::run(&kernel.image, &file, &log, Duration::from_secs(limit.into()))?;
    let console = fs::read(&log).with_context(|| format!("read {}", log.display()))?;
    let names: Vec<_> =
        steps.iter().map(|step| (step.name.as_str(), !CHECKS.contains(&step.name.as_str()))).collect();
    let mut outcome = console::read(&String::from_utf8_lossy(&console), &names);
    if !in_time {
        outcome.problems.insert(0, format!("was ended after {limit} s"));
    }
    let verdict = if outcome.problems.is_empty() { "ok" } else { "failed" };
    eprintln!("kernels: {}: {verdict} after {} s", kernel.name, start.elapsed().as_secs());
    Ok(outcome)
}

fn finish(rows: &[report::Row], is_whole: bool) -> Result<()> {
    let table = report::table(rows);
    println!("{table}");
    if is_whole {
        let path = workspace::root().join(DOCUMENT);
        let document = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        fs::write(&path, report::put(&document, &table)?)?;
        eprintln!("kernels: wrote {DOCUMENT}");
    }
    let failed: Vec<&str> = rows
        .iter()
        .filter(|(_, outcome)| !outcome.problems.is_empty())
        .map(|(name, _)| name.as_str())
        .collect();
    if !failed.is_empty() {
        for (name, outcome) in rows {
            for problem in &outcome.problems {
                eprintln!("kernels: {name}: {problem}");
            }
        }
        bail!("failed on {}", failed.join(", "));
    }
    Ok(())
}
