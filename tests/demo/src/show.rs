//! The demo's output: a spinner for the check that runs, a line for each check that ended, and the
//! result once at the end.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::testbed::Testbed;
use dataplane_testkit::lab;

/// Prints the checks and keeps them for the result.
pub(super) struct Show {
    json: bool,
    bar: ProgressBar,
    began: Instant,
    checks: Vec<Check>,
}

/// A check that ended.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: String,
    ok: bool,
    /// What the check found, or the error.
    result: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    evidence: String,
    seconds: f64,
}

#[derive(Serialize)]
struct Summary<'a> {
    ok: bool,
    seconds: f64,
    checks: &'a [Check],
}

impl Show {
    pub(super) fn new(json: bool) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { json, bar, began: Instant::now(), checks: Vec::new() }
    }

    /// Prints a line that is no check.
    pub(super) fn note(&self, text: &str) {
        self.line(text);
    }

    /// Does something that is no check, while the spinner names it.
    pub(super) fn during<T>(&self, what: &str, task: impl FnOnce() -> T) -> T {
        self.bar.reset_elapsed();
        self.bar.set_message(what.to_owned());
        task()
    }

    /// Runs a check, which returns what it found. A failure is kept with the state of the nodes,
    /// and the demo continues.
    pub(super) fn check(
        &mut self,
        testbed: &mut Testbed,
        name: &str,
        task: impl FnOnce(&mut Testbed) -> Result<String>,
    ) {
        let began = Instant::now();
        let result = self.during(name, || task(testbed));
        let evidence = if result.is_err() { testbed.evidence() } else { String::new() };
        self.record(name, result, evidence, began.elapsed());
    }

    /// A step of building the cluster.
    pub(super) fn build<T>(&mut self, name: &str, task: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
        let began = Instant::now();
        let (value, found) = self.during(name, task)?;
        self.record(name, Ok(found), String::new(), began.elapsed());
        Ok(value)
    }

    /// Records an error that ends the demo early.
    pub(super) fn failed(&mut self, name: &str, error: &Error) {
        self.record(name, Err(anyhow::anyhow!("{error:#}")), String::new(), self.began.elapsed());
    }

    /// Prints failures with their evidence, and the result. Success if no check failed.
    pub(super) fn finish(self) -> Result<ExitCode> {
        self.bar.finish_and_clear();
        let failed: Vec<&Check> = self.checks.iter().filter(|check| !check.ok).collect();
        let seconds = self.began.elapsed().as_secs_f64();
        let mut output = self.output();
        for check in &failed {
            writeln!(output, "\n{} failed: {}\n{}", check.name, check.result, check.evidence)?;
        }
        if self.json {
            let summary = Summary { ok: failed.is_empty(), seconds, checks: &self.checks };
            writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&summary)?)?;
        }
        if failed.is_empty() {
            writeln!(output, "\n{} checks passed in {seconds:.0} s\ndemo: OK", self.checks.len())?;
            return Ok(ExitCode::SUCCESS);
        }
        let names: Vec<&str> = failed.iter().map(|check| check.name.as_str()).collect();
        writeln!(
            output,
            "\n{} of {} checks failed: {}\ndemo: FAILED",
            failed.len(),
            self.checks.len(),
            names.join("; ")
        )?;
        Ok(ExitCode::FAILURE)
    }

    fn record(&mut self, name: &str, result: Result<String>, evidence: String, took: Duration) {
        if lab::is_interrupted() {
            return;
        }
        let ok = result.is_ok();
        let result = result.unwrap_or_else(|error| format!("{error:#}"));
        self.line(&format!("{} {name}: {}", if ok { "ok  " } else { "FAIL" }, first_line(&result)));
        self.checks.push(Check { name: name.to_owned(), ok, result, evidence, seconds: took.as_secs_f64() });
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| {
            // the reader of a pipe may have ended
            let _closed = writeln!(self.output(), "{text}");
        });
    }

    /// Stdout, or stderr if stdout is for JSON.
    fn output(&self) -> Box<dyn Write> {
        if self.json { Box::new(io::stderr()) } else { Box::new(io::stdout()) }
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
