//! Reads the console of a guest: the findings of `dataplane-kernel-check` and the results of the
//! tests.

use serde::Deserialize;

use crate::test::libtest::{Output, Report};

/// The results of one kernel.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Release of the kernel; empty if the console has none.
    pub(super) release: String,
    pub(super) programs: Vec<Program>,
    pub(super) hooks: Vec<Hook>,
    pub(super) traffic: Vec<Traffic>,
    /// Results of the tests, by step.
    pub(super) suites: Vec<(String, Report)>,
    /// All reasons why this kernel counts as failed.
    pub(super) problems: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) verified: Option<u32>,
    pub(super) refused: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Hook {
    pub(super) place: String,
    pub(super) how: Option<String>,
    pub(super) refused: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Traffic {
    pub(super) mode: String,
    what: String,
    pub(super) failed: Option<String>,
}

/// A finding, in the format that `dataplane-kernel-check` prints.
#[derive(Deserialize)]
#[serde(tag = "of", rename_all = "snake_case")]
enum Finding {
    Kernel { release: String },
    Program(Program),
    Hook(Hook),
    Traffic(Traffic),
}

/// Reads a console. `steps` are all steps of the guest; `is_suite` tells which of them are test
/// binaries.
pub(super) fn read(console: &str, steps: &[(&str, bool)]) -> Outcome {
    let mut outcome = Outcome::default();
    for (name, is_suite) in steps {
        let Some((lines, end)) = section(console, name) else {
            outcome.problems.push(format!("{name} did not run"));
            continue;
        };
        let end = match end {
            Some("0") => None,
            Some(status) => Some(format!("ended with status {status}")),
            None => Some("the guest ended before it did".to_owned()),
        };
        if *is_suite {
            outcome.suite(name, &lines, end);
        } else {
            outcome.findings(name, &lines, end);
        }
    }
    outcome.problems.extend(
        console
            .lines()
            .filter(|line| line.contains("Kernel panic") || line.starts_with("MODULE "))
            .map(str::to_owned),
    );
    outcome
}

impl Outcome {
    fn findings(&mut self, step: &str, lines: &[&str], end: Option<String>) {
        let known = self.problems.len();
        for line in lines.iter().filter_map(|line| line.split_once("FINDING ").map(|(_, json)| json)) {
            match serde_json::from_str(line) {
                Ok(Finding::Kernel { release }) => self.release = release,
                Ok(Finding::Program(program)) => {
                    let name = &program.name;
                    self.problems.extend(program.refused.iter().map(|why| format!("program {name}: {why}")));
                    self.programs.push(program);
                }
                Ok(Finding::Hook(hook)) => {
                    let place = &hook.place;
                    self.problems.extend(hook.refused.iter().map(|why| format!("{place}: {why}")));
                    self.hooks.push(hook);
                }
                Ok(Finding::Traffic(traffic)) => {
                    let (mode, what) = (&traffic.mode, &traffic.what);
                    self.problems.extend(traffic.failed.iter().map(|why| format!("{mode}: {what}: {why}")));
                    self.traffic.push(traffic);
                }
                Err(error) => self.problems.push(format!("{step}: {error} in {line}")),
            }
        }
        if let Some(end) = end.filter(|_| self.problems.len() == known) {
            let error = lines.iter().find(|line| line.starts_with("Error: ")).or(lines.last());
            self.problems.push(format!("{step} {end}: {}", error.unwrap_or(&"no message")));
        }
    }

    fn suite(&mut self, name: &str, lines: &[&str], end: Option<String>) {
        let mut output = Output::of(binary(name), name);
        for line in lines {
            output.line(line);
        }
        let report = output.finish(end);
        for failure in &report.failures {
            self.problems.push(format!("{}: {}", failure.test, failure.reason.trim()));
        }
        self.suites.push((name.to_owned(), report));
    }
}

/// The binary of a step, which may be a module of it.
fn binary(step: &str) -> &str {
    step.split("::").next().unwrap_or(step)
}

/// The output of a step, and its exit status.
fn section<'a>(console: &'a str, name: &str) -> Option<(Vec<&'a str>, Option<&'a str>)> {
    let begin = format!("BEGIN {name}");
    let end = format!("END {name} ");
    let mut section = Vec::new();
    let mut lines = console.lines().map(str::trim_end).skip_while(|line| *line != begin);
    lines.next()?;
    for line in lines {
        if let Some(status) = line.strip_prefix(&end) {
            return Some((section, Some(status)));
        }
        section.push(line);
    }
    Some((section, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "\
        SeaBIOS\r\n\
        BEGIN check\r\n\
        FINDING {\"of\":\"kernel\",\"release\":\"5.10.0-46-cloud-amd64\"}\r\n\
        FINDING {\"of\":\"program\",\"name\":\"from_pod\",\"verified\":null,\"refused\":null}\r\n\
        FINDING {\"of\":\"program\",\"name\":\"to_pod\",\"verified\":null,\"refused\":\"R1 is no pointer\"}\r\n\
        END check 1\r\n\
        BEGIN prog_forward\r\n\
        test a_packet_passes ... ok\r\n\
        test a_packet_stays ... FAILED\r\n\
        failures:\r\n\
        ---- a_packet_stays stdout ----\r\n\
        it passed\r\n\
        failures:\r\n    a_packet_stays\r\n\
        test result: FAILED. 1 passed; 1 failed; 0 ignored\r\n\
        END prog_forward 101\r\n\
        BEGIN prog_flows\r\n\
        test a_flow_is_made ... ok\r\n";

    #[test]
    fn findings_and_failures_are_read() {
        let outcome = read(CONSOLE, &[("check", false), ("prog_forward", true)]);
        assert_eq!(outcome.release, "5.10.0-46-cloud-amd64");
        assert_eq!(outcome.programs.len(), 2);
        assert_eq!(outcome.suites[0].1.passed, 1);
        assert_eq!(
            outcome.problems,
            ["program to_pod: R1 is no pointer", "prog_forward::a_packet_stays: it passed"]
        );
    }

    #[test]
    fn step_without_an_end_is_a_problem() {
        let outcome = read(CONSOLE, &[("prog_flows", true), ("prog_services", true)]);
        assert_eq!(
            outcome.problems,
            ["prog_flows: the guest ended before it did", "prog_services did not run"]
        );
        assert_eq!(outcome.suites[0].1.passed, 0);
    }

    #[test]
    fn problem_of_a_check_without_findings_has_its_last_output() {
        let console = "BEGIN check\nError: load the object's maps\nEND check 1\nKernel panic - not syncing\n";
        let outcome = read(console, &[("check", false)]);
        assert_eq!(
            outcome.problems,
            ["check ended with status 1: Error: load the object's maps", "Kernel panic - not syncing"]
        );
    }
}
