//! Reads what a test binary prints with `--show-output`, line by line.

/// A test that failed, or did not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) test: String,
    pub(crate) reason: String,
}

/// What became of one binary's tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) passed: usize,
    pub(crate) failures: Vec<Case>,
    pub(crate) skips: Vec<Case>,
    /// What a test wants to be read at the end.
    pub(crate) summaries: Vec<String>,
}

/// The binary's output so far.
#[derive(Debug, Default)]
pub(crate) struct Output {
    binary: String,
    /// What runs: the binary, or a part of it.
    whole: String,
    passed: usize,
    /// Tests that libtest counts as passed, but that said they did nothing.
    passed_by_skipping: usize,
    failed: usize,
    /// Whether the binary came to its end.
    has_result: bool,
    failures: Vec<Case>,
    skips: Vec<Case>,
    summaries: Vec<String>,
    /// The test whose output the lines now belong to.
    section: Option<String>,
}

impl Output {
    pub(crate) fn of(binary: &str, whole: &str) -> Self {
        Self { binary: binary.to_owned(), whole: whole.to_owned(), ..Self::default() }
    }

    /// Takes the next line. If it tells the end of a test: which, and how it ended.
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
        } else if let Some((test, how)) = ended(line) {
            self.ended(test, how);
            return Some((test, how));
        }
        None
    }

    fn ended(&mut self, test: &str, how: &str) {
        let name = self.name(test);
        if how == "FAILED" {
            self.failures.push(Case { test: name, reason: String::new() });
        } else if let Some(reason) = how.strip_prefix("ignored") {
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
            self.passed_by_skipping += 1;
        }
    }

    /// After the last line. `end` says how the process ended, if not well.
    pub(crate) fn finish(mut self, end: Option<String>) -> Report {
        // a binary that fails says so by its tests; otherwise something else went wrong, and must not be lost
        if let Some(end) = end
            && (self.failed == 0 || !self.has_result)
        {
            self.failures.push(Case { test: self.whole, reason: end });
        } else if !self.has_result {
            let reason = "ended without a result".to_owned();
            self.failures.push(Case { test: self.whole, reason });
        }
        let passed = self.passed.saturating_sub(self.passed_by_skipping);
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

/// `test NAME ... HOW`.
fn ended(line: &str) -> Option<(&str, &str)> {
    let (test, how) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let test = test.strip_suffix(" - should panic").unwrap_or(test);
    (how == "ok" || how == "FAILED" || how.starts_with("ignored")).then_some((test, how))
}

/// The number before `word`.
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
    fn a_skip_is_not_a_pass_and_a_failure_keeps_its_output() {
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
    fn a_binary_that_dies_is_a_failure() {
        let report = read("running 2 tests\ntest one ... ok\n", Some("signal: 11"));
        assert_eq!(report.failures, [case("b", "signal: 11")]);
    }

    #[test]
    fn a_binary_that_says_nothing_is_a_failure() {
        assert_eq!(read("", None).failures, [case("b", "ended without a result")]);
    }

    #[test]
    fn results_of_several_runs_add_up() {
        let line =
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0s\n";
        assert_eq!(read(&line.repeat(2), None), Report { passed: 6, ..Report::default() });
    }

    #[test]
    fn the_end_of_a_test_is_told() {
        assert_eq!(Output::of("b", "b").line("test frame - should panic ... ok"), Some(("frame", "ok")));
    }
}
