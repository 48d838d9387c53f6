//! Runs one test binary and watches it.

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

/// How often the end of a silent binary is looked for.
const LOOK: Duration = Duration::from_millis(100);
/// Lines of stderr kept for a binary that fails.
const KEPT: usize = 60;

/// Has tests run all of what they otherwise take a sample of.
const FULL: &str = "DATAPLANE_FULL";

/// How much of a long table runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    Sample,
    Full,
}

impl Extent {
    /// A binary that takes longer hangs.
    const fn limit(self) -> Duration {
        match self {
            Self::Sample => Duration::from_mins(20),
            Self::Full => Duration::from_hours(2),
        }
    }
}

/// A line, and from where.
enum Line {
    Out(String),
    Err(String),
}

/// The binaries that have tests the filter matches, with only those.
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

/// The binary once for each of its modules, with the module's tests. Tests of a module share a process, as what they share
/// demands; tests of two modules do not disturb each other.
pub(crate) fn by_module(binary: &Binary) -> Result<Vec<Binary>> {
    let mut modules: BTreeMap<Option<String>, Vec<String>> = BTreeMap::new();
    for test in binary.only.clone().map_or_else(|| list(binary), Ok)? {
        let module = test.split_once("::").map(|(module, _)| module.to_owned());
        modules.entry(module).or_default().push(test);
    }
    let of_module = |(module, tests)| Binary { module, only: Some(tests), ..binary.clone() };
    Ok(modules.into_iter().map(of_module).collect())
}

/// Names of its tests.
fn list(binary: &Binary) -> Result<Vec<String>> {
    let mut list = Command::new(&binary.executable);
    let text = process::output(list.args(["--list", "--format", "terse"]).current_dir(&binary.directory))?;
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// Runs all its tests, or the selected ones.
pub(super) fn run(binary: &Binary, extent: Extent) -> Result<Report> {
    if binary.needs_root && !process::is_root() {
        let reason = "loads programs and makes network namespaces: needs root".to_owned();
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
    watch(&binary.name, &binary.label(), &mut command, extent.limit())
}

/// Examples in the documentation; cargo builds and runs them itself.
pub(super) fn run_doc_tests() -> Result<Report> {
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--doc"]).args(workspace::FOR_HOST);
    cargo.args(["--no-fail-fast", "--", "--show-output"]);
    watch("documentation", "documentation", &mut cargo, Extent::Sample.limit())
}

/// Tests have `name` before them; what is not the fault of one is that of `whole`.
fn watch(name: &str, whole: &str, command: &mut Command, limit: Duration) -> Result<Report> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("run {}", process::line(command)))?;
    let (sender, lines) = mpsc::channel();
    forward(child.stdout.take().context("stdout is piped")?, sender.clone(), Line::Out);
    forward(child.stderr.take().context("stderr is piped")?, sender, Line::Err);

    let deadline = Instant::now() + limit;
    let mut output = Output::of(name, whole);
    let mut complaints = Vec::new();
    let mut has_ended = false;
    loop {
        match lines.recv_timeout(LOOK) {
            Ok(Line::Out(line)) => {
                if let Some((test, how)) = output.line(&line) {
                    println!("{name}::{test} ... {how}");
                }
            }
            Ok(Line::Err(line)) => complaints.push(line),
            // what it started may outlive it and hold its output open
            Err(RecvTimeoutError::Timeout) if has_ended => break,
            Err(RecvTimeoutError::Timeout) => has_ended = child.try_wait()?.is_some(),
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if !has_ended && Instant::now() > deadline {
            complaints.push(format!("killed: it ran for more than {limit:?}"));
            child.kill()?;
            break;
        }
    }
    let status = child.wait()?;
    let problem = (!status.success()).then(|| {
        let tail = complaints.split_off(complaints.len().saturating_sub(KEPT));
        format!("{status}\n{}", tail.join("\n"))
    });
    let report = output.finish(problem);
    for failure in &report.failures {
        println!("\nFAILED {}\n{}", failure.test, failure.reason);
    }
    Ok(report)
}

/// Sends every line of a pipe, until it closes or nobody listens.
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
