//! The table of results, one column per kernel: on stdout and in `docs/kernels.md`.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};

use super::console::Outcome;

/// Marks around the table in the document.
const BEGIN: &str = "<!-- results: written by `cargo xtask kernels` -->\n";
const END: &str = "<!-- end of results -->\n";

/// Name of a kernel from the command line, and its results.
pub(super) type Row = (String, Outcome);

/// The table in Markdown.
pub(super) fn table(rows: &[Row]) -> String {
    let mut text = String::from("Instructions the verifier walked (it refuses a program at 1,000,000):\n\n");
    line(&mut text, "program", rows.iter().map(|(name, outcome)| release(name, outcome).to_owned()));
    line(&mut text, "---", rows.iter().map(|_| "---:".to_owned()));
    for program in names(rows, |outcome| outcome.programs.iter().map(|program| program.name.as_str())) {
        let cells = rows.iter().map(|(_, outcome)| {
            let found = outcome.programs.iter().find(|found| found.name == program);
            found.map_or_else(
                || "?".to_owned(),
                |found| verdict(found.refused.is_some(), found.verified.map(grouped).as_ref()),
            )
        });
        line(&mut text, &format!("`{program}`"), cells);
    }
    text += "\nHow programs are attached, and the tests that ran (passed; failed and skipped ones in words below):\n\n";
    line(&mut text, "", rows.iter().map(|(name, outcome)| release(name, outcome).to_owned()));
    line(&mut text, "---", rows.iter().map(|_| "---:".to_owned()));
    for place in names(rows, |outcome| outcome.hooks.iter().map(|hook| hook.place.as_str())) {
        let cells = rows.iter().map(|(_, outcome)| {
            let found = outcome.hooks.iter().find(|found| found.place == place);
            found.map_or_else(|| "?".to_owned(), |found| verdict(found.refused.is_some(), found.how.as_ref()))
        });
        line(&mut text, place, cells);
    }
    for mode in names(rows, |outcome| outcome.traffic.iter().map(|traffic| traffic.mode.as_str())) {
        let cells = rows.iter().map(|(_, outcome)| {
            let of_mode = outcome.traffic.iter().filter(|traffic| traffic.mode == mode);
            let (failed, passed) = of_mode.partition::<Vec<_>, _>(|traffic| traffic.failed.is_some());
            match (passed.len(), failed.len()) {
                (0, 0) => "?".to_owned(),
                (passed, 0) => passed.to_string(),
                (passed, failed) => format!("{passed}, {failed} failed"),
            }
        });
        line(&mut text, &format!("traffic: {mode}"), cells);
    }
    for suite in names(rows, |outcome| outcome.suites.iter().map(|(name, _)| name.as_str())) {
        let cells = rows.iter().map(|(_, outcome)| {
            let Some((_, report)) = outcome.suites.iter().find(|(name, _)| name == suite) else {
                return "?".to_owned();
            };
            let mut cell = report.passed.to_string();
            for (cases, what) in [(&report.failures, "failed"), (&report.skips, "skipped")] {
                if !cases.is_empty() {
                    cell += &format!(", {} {what}", cases.len());
                }
            }
            cell
        });
        line(&mut text, &format!("`{suite}`"), cells);
    }
    words(&mut text, rows);
    text
}

/// Details below the table.
fn words(text: &mut String, rows: &[Row]) {
    for (name, outcome) in rows {
        let problems = outcome.problems.iter().map(|problem| ("failed", problem.clone()));
        let skips = outcome.suites.iter().flat_map(|(_, report)| &report.skips);
        let skips = skips.map(|skip| ("skipped", format!("{}: {}", skip.test, skip.reason)));
        let all: Vec<_> = problems.chain(skips).collect();
        if !all.is_empty() {
            text.push_str(&format!("\n{}:\n\n", release(name, outcome)));
        }
        for (what, why) in all {
            let first = why.lines().next().unwrap_or_default();
            text.push_str(&format!("- {what}: {first}\n"));
        }
    }
}

fn release<'a>(name: &'a str, outcome: &'a Outcome) -> &'a str {
    let release = outcome.release.as_str();
    if release.is_empty() { name } else { release.trim_end_matches("-cloud-amd64") }
}

fn verdict(is_refused: bool, value: Option<&String>) -> String {
    match value {
        _ if is_refused => "refused".to_owned(),
        Some(value) => value.clone(),
        None => "ok".to_owned(),
    }
}

fn grouped(number: u32) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Names of all rows, each once, in order of first appearance.
fn names<'a, I: Iterator<Item = &'a str>>(rows: &'a [Row], of: impl Fn(&'a Outcome) -> I) -> Vec<&'a str> {
    let mut names = Vec::new();
    for name in rows.iter().flat_map(|(_, outcome)| of(outcome)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn line(text: &mut String, first: &str, cells: impl Iterator<Item = String>) {
    let cells: Vec<String> = cells.collect();
    // writing to a String cannot fail
    let _infallible = writeln!(text, "| {first} | {} |", cells.join(" | "));
}

/// The document with a new table.
pub(super) fn put(document: &str, table: &str) -> Result<String> {
    let (before, rest) =
        document.split_once(BEGIN).context("docs/kernels.md has no mark for the beginning of the results")?;
    let (_, after) =
        rest.split_once(END).context("docs/kernels.md has no mark for the end of the results")?;
    Ok(format!("{before}{BEGIN}\n{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::{super::console::Program, *};

    fn row(name: &str, verified: Option<u32>, refused: Option<&str>) -> Row {
        let program = Program { name: "from_pod".to_owned(), verified, refused: refused.map(str::to_owned) };
        (name.to_owned(), Outcome { programs: vec![program], ..Outcome::default() })
    }

    #[test]
    fn program_has_its_instruction_count_or_its_error() {
        let rows =
            [row("5.10", None, None), row("6.1", Some(218_036), None), row("6.12", None, Some("too long"))];
        let table = table(&rows);
        assert!(table.contains("| program | 5.10 | 6.1 | 6.12 |"), "{table}");
        assert!(table.contains("| `from_pod` | ok | 218,036 | refused |"), "{table}");
    }

    #[test]
    fn only_the_results_in_the_document_change() {
        let document = format!("# Kernels\n{BEGIN}old\n{END}\nmore\n");
        let new = put(&document, "new\n").unwrap();
        assert_eq!(new, format!("# Kernels\n{BEGIN}\nnew\n\n{END}\nmore\n"));
        assert!(put("# Kernels\n", "new\n").is_err());
    }
}
