//! Runs one test binary, reads its output and ends it after a time limit.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    binaries::Binary,
    libtest::{Case, Output, Report},
};
use crate::{process, workspace};

/// How often to check whether a silent binary has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Last lines of stderr that are printed for a binary that fails.
const STDERR_LINES: usize = 60;

/// Environment variable that makes tests run all cases of long tables.
const FULL: &str = "DATAPLANE_FULL";

/// Which cases of long tables run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    Sample,
    Full,
}

impl Extent {
    /// A binary that runs longer is killed.
    const fn time_limit(self) -> Duration {
        match self {
            Self::Sample => Duration::from_mins(20),
            Self::Full => Duration::from_hours(2),
        }
    }
}

/// A line of output.
enum Line {
    Stdout(String),
    Stderr(String),
}

/// The binaries with tests that the filter matches, restricted to those tests.
pub(super) fn select(binaries: Vec<Binary>, filter: &str) -> Result<Vec<Binary>> {
    let mut selected = Vec::new();
    for mut binary in binaries {
        let mut tests = list(&binary)?;
        tests.retain(|test| format!("{}::{test}", binary.name).contains(filter));
        if !tests.is_empty() {
            binary.only = Some(tests);
            selected.push(binary);
        }
    }
    Ok(selected)
}

/// One part of the binary for each of its modules. Tests of a module share a process and what they
/// set up in it; modules do not affect each other.
pub(crate) fn by_module(binary: &Binary) -> Result<Vec<Binary>> {
    let mut modules: BTreeMap<Option<String>, Vec<String>> = BTreeMap::new();
    for test in binary.only.clone().map_or_else(|| list(binary), Ok)? {
        let module = test.split_once("::").map(|(module, _)| module.to_owned());
        modules.entry(module).or_default().push(test);
    }
    let of_module = |(module, tests)| Binary { module, only: Some(tests), ..binary.clone() };
    Ok(modules.into_iter().map(of_module).collect())
}

/// Names of all tests of a binary.
fn list(binary: &Binary) -> Result<Vec<String>> {
    let mut list = Command::new(&binary.executable);
    let text = process::output(list.args(["--list", "--format", "terse"]).current_dir(&binary.directory))?;
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// Runs all tests of a binary, or the selected ones.
pub(super) fn run(binary: &Binary, extent: Extent) -> Result<Report> {
    if binary.needs_root && !process::is_root() {
        let reason = "loads eBPF programs and creates network namespaces: needs root".to_owned();
        let skip = Case { test: binary.label(), reason };
        return Ok(Report { skips: vec![skip], ..Report::default() });
    }
    let mut command = Command::new(&binary.executable);
    command.current_dir(&binary.directory).env("CARGO_MANIFEST_DIR", &binary.directory).arg("--show-output");
    if extent == Extent::Full {
        command.env(FULL, "1");
    }
    if let Some(only) = &binary.only {
        command.arg("--exact").args(only);
    }
    run_command(&binary.name, &binary.label(), &mut command, extent.time_limit())
}

/// Runs the examples in the documentation, which only cargo can build.
pub(super) fn run_doc_tests() -> Result<Report> {
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--doc"]).args(workspace::FOR_HOST);
    cargo.args(["--no-fail-fast", "--", "--show-output"]);
    run_command("documentation", "documentation", &mut cargo, Extent::Sample.time_limit())
}

/// Runs a command that prints what libtest prints. `name` is the prefix of test names; a failure of
/// no particular test is reported as one of `whole`.
fn run_command(name: &str, whole: &str, command: &mut Command, time_limit: Duration) -> Result<Report> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("run {}", process::line(command)))?;
    let (sender, lines) = mpsc::channel();
    forward(child.stdout.take().context("stdout is piped")?, sender.clone(), Line::Stdout);
    forward(child.stderr.take().context("stderr is piped")?, sender, Line::Stderr);

    let deadline = Instant::now() + time_limit;
    let mut output = Output::of(name, whole);
    let mut stderr = Vec::new();
    let mut has_ended = false;
    loop {
        match lines.recv_timeout(POLL_INTERVAL) {
            Ok(Line::Stdout(line)) => {
                if let Some((test, result)) = output.line(&line) {
                    println!("{name}::{test} ... {result}");
                }
            }
            Ok(Line::Stderr(line)) => stderr.push(line),
            // a process that the binary started may keep the pipes open
            Err(RecvTimeoutError::Timeout) if has_ended => break,
            Err(RecvTimeoutError::Timeout) => has_ended = child.try_wait()?.is_some(),
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if !has_ended && Instant::now() > deadline {
            stderr.push(format!("killed: it ran for more than {time_limit:?}"));
            child.kill()?;
            break;
        }
    }
    let status = child.wait()?;
    let failure = (!status.success()).then(|| {
        let tail = stderr.split_off(stderr.len().saturating_sub(STDERR_LINES));
        format!("{status}\n{}", tail.join("\n"))
    });
    let report = output.finish(failure);
    for failure in &report.failures {
        println!("\nFAILED {}\n{}", failure.test, failure.reason);
    }
    Ok(report)
}

/// Sends each line of a pipe until the pipe or the channel closes.
fn forward(pipe: impl Read + Send + 'static, lines: Sender<Line>, wrap: fn(String) -> Line) {
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            line.clear();
            if lines.send(wrap(text)).is_err() {
                return;
            }
        }
    });
}
