//! Reads the output of a test binary that runs with `--show-output`, line by line.

/// A test that failed or was skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) test: String,
    pub(crate) reason: String,
}

/// The results of one binary's tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) passed: usize,
    pub(crate) failures: Vec<Case>,
    pub(crate) skips: Vec<Case>,
    /// Lines that tests print for the end of the run.
    pub(crate) summaries: Vec<String>,
}

/// State of reading one binary's output.
#[derive(Debug, Default)]
pub(crate) struct Output {
    binary: String,
    /// The binary, or the part of it that runs.
    whole: String,
    passed: usize,
    /// Tests that libtest counts as passed although they printed `SKIP`.
    skipped_as_passed: usize,
    failed: usize,
    /// Whether the binary printed its result line.
    has_result: bool,
    failures: Vec<Case>,
    skips: Vec<Case>,
    summaries: Vec<String>,
    /// The test whose output is being read.
    section: Option<String>,
}

impl Output {
    pub(crate) fn of(binary: &str, whole: &str) -> Self {
        Self { binary: binary.to_owned(), whole: whole.to_owned(), ..Self::default() }
    }

    /// Reads the next line. Returns the test and its result if the line contains a result.
    pub(crate) fn line<'a>(&mut self, line: &'a str) -> Option<(&'a str, &'a str)> {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
            self.has_result = true;
            self.section = None;
        } else if let Some(test) =
            line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.section = Some(test.to_owned());
        } else if line == "successes:" || line == "failures:" {
            self.section = None;
        } else if let Some(test) = self.section.clone() {
            self.output_of(&test, line);
        } else if let Some((test, result)) = test_result(line) {
            self.record(test, result);
            return Some((test, result));
        }
        None
    }

    fn record(&mut self, test: &str, result: &str) {
        let name = self.name(test);
        if result == "FAILED" {
            self.failures.push(Case { test: name, reason: String::new() });
        } else if let Some(reason) = result.strip_prefix("ignored") {
            let reason = reason.trim_start_matches(", ");
            let reason = if reason.is_empty() { "ignored, without a reason" } else { reason };
            self.skips.push(Case { test: name, reason: reason.to_owned() });
        }
    }

    fn output_of(&mut self, test: &str, line: &str) {
        let name = self.name(test);
        self.summaries.extend(line.strip_prefix("SUMMARY: ").map(str::to_owned));
        if let Some(failure) = self.failures.iter_mut().find(|failure| failure.test == name) {
            failure.reason.push_str(line);
            failure.reason.push('\n');
        } else if let Some(reason) = skip_reason(line)
            && !self.skips.iter().any(|skip| skip.test == name)
        {
            self.skips.push(Case { test: name, reason: reason.to_owned() });
            self.skipped_as_passed += 1;
        }
    }

    /// The report, after the last line. `failure` is the exit status and stderr of a process that
    /// failed.
    pub(crate) fn finish(mut self, failure: Option<String>) -> Report {
        // a process can also fail without a failed test
        if let Some(failure) = failure
            && (self.failed == 0 || !self.has_result)
        {
            self.failures.push(Case { test: self.whole, reason: failure });
        } else if !self.has_result {
            let reason = "ended without a result".to_owned();
            self.failures.push(Case { test: self.whole, reason });
        }
        let passed = self.passed.saturating_sub(self.skipped_as_passed);
        Report { passed, failures: self.failures, skips: self.skips, summaries: self.summaries }
    }

    fn name(&self, test: &str) -> String {
        format!("{}::{test}", self.binary)
    }
}

/// The reason in a line `SKIP: reason`.
fn skip_reason(line: &str) -> Option<&str> {
    line.trim_start().strip_prefix("SKIP")?.strip_prefix([':', ' ']).map(str::trim)
}

/// Test and result in a line `test NAME ... RESULT`.
fn test_result(line: &str) -> Option<(&str, &str)> {
    let (test, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let test = test.strip_suffix(" - should panic").unwrap_or(test);
    (result == "ok" || result == "FAILED" || result.starts_with("ignored")).then_some((test, result))
}

/// The number before a word.
fn count(result: &str, word: &str) -> usize {
    let words: Vec<&str> = result.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
    let place = words.iter().position(|candidate| *candidate == word).unwrap_or(0);
    place.checked_sub(1).and_then(|before| words[before].parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIXED: &str = "
running 4 tests
test a::passes ... ok
test skips ... ok
test later ... ignored, needs a cluster
test fails ... FAILED

successes:

---- skips stdout ----
SKIP: this kernel has no tcx
SKIP: said twice

---- a::passes stdout ----
some output
SUMMARY: 3 of 4


successes:
    a::passes
    skips

failures:

---- fails stdout ----

thread 'fails' panicked at src/lib.rs:3:9:
boom

failures:
    fails

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    fn case(test: &str, reason: &str) -> Case {
        Case { test: test.to_owned(), reason: reason.to_owned() }
    }

    fn read(text: &str, end: Option<&str>) -> Report {
        let mut output = Output::of("b", "b");
        for line in text.lines() {
            output.line(line);
        }
        output.finish(end.map(str::to_owned))
    }

    #[test]
    fn skipped_test_does_not_count_as_passed_and_failure_has_its_output() {
        let report = read(MIXED, Some("exit status: 101"));
        assert_eq!(report.passed, 1);
        assert_eq!(report.summaries, ["3 of 4"]);
        assert_eq!(
            report.skips,
            [case("b::later", "needs a cluster"), case("b::skips", "this kernel has no tcx")]
        );
        let [failure] = &report.failures[..] else { panic!("one failure: {:?}", report.failures) };
        assert_eq!(failure.test, "b::fails");
        assert!(failure.reason.contains("boom"), "{}", failure.reason);
    }

    #[test]
    fn binary_killed_by_a_signal_is_a_failure() {
        let report = read("running 2 tests\ntest one ... ok\n", Some("signal: 11"));
        assert_eq!(report.failures, [case("b", "signal: 11")]);
    }

    #[test]
    fn binary_without_output_is_a_failure() {
        assert_eq!(read("", None).failures, [case("b", "ended without a result")]);
    }

    #[test]
    fn counts_of_several_result_lines_are_added() {
        let line =
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0s\n";
        assert_eq!(read(&line.repeat(2), None), Report { passed: 6, ..Report::default() });
    }

    #[test]
    fn result_of_a_test_is_returned() {
        assert_eq!(Output::of("b", "b").line("test frame - should panic ... ok"), Some(("frame", "ok")));
    }
}
