//! Markdown can be read as text: prose wraps at 120 columns, and the cells of [`NARROW`] tables are
//! short.
//!
//! Tables, code blocks and lines that consist of a link cannot be wrapped and are exempt.

use std::path::Path;

use anyhow::Result;

use super::{Outcome, columns, is_unbreakable, outcome, prose, read};

const COLUMNS: usize = 120;

/// Files whose tables are read as text: no cell is wider than [`COLUMNS`].
const NARROW: [&str; 1] = ["docs/behaviours.md"];

pub(super) fn check() -> Result<Outcome> {
    let mut found = Vec::new();
    for (file, text) in read("md")? {
        found.extend(wide_prose(&file, &text));
        if NARROW.iter().any(|narrow| file == Path::new(narrow)) {
            found.extend(wide_cells(&file, &text));
        }
    }
    outcome("Markdown is too wide", &found)
}

fn is_row(line: &str) -> bool {
    line.trim_start().starts_with('|')
}

fn wide_prose(file: &Path, text: &str) -> Vec<String> {
    prose(text)
        .filter(|(_, line)| columns(line) > COLUMNS && !is_row(line) && !is_unbreakable(line))
        .map(|(number, line)| {
            let columns = columns(line);
            format!(
                "{}:{number}: {columns} columns, {COLUMNS} are allowed; wrap the paragraph",
                file.display()
            )
        })
        .collect()
}

fn wide_cells(file: &Path, text: &str) -> Vec<String> {
    let rows = prose(text).filter(|(_, line)| is_row(line));
    rows.flat_map(|(number, line)| {
        let wide = cells(line).map(|cell| columns(cell.trim())).filter(|&columns| columns > COLUMNS);
        wide.map(move |columns| {
            format!(
                "{}:{number}: a cell of {columns} columns, {COLUMNS} are allowed; shorten it, or move it below the \
                 table",
                file.display()
            )
        })
    })
    .collect()
}

/// The cells of a row. `\|` is part of a cell.
fn cells(row: &str) -> impl Iterator<Item = &str> {
    let mut escaped = false;
    row.split(move |c| {
        let ends = c == '|' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_prose_is_reported_and_what_cannot_wrap_is_not() {
        let wide = "word ".repeat(30);
        let file = Path::new("a.md");
        let found = wide_prose(file, &format!("# a\n\n{wide}\n"));
        assert_eq!(found, ["a.md:3: 150 columns, 120 are allowed; wrap the paragraph"]);
        let link = format!("- [{wide}](b.md)");
        assert!(wide_prose(file, &format!("| {wide} |\n```text\n{wide}\n```\n{link}\n")).is_empty());
    }

    #[test]
    fn wide_cells_are_reported() {
        let wide = "x".repeat(COLUMNS + 1);
        let fits = "x".repeat(COLUMNS);
        let found = wide_cells(Path::new("a.md"), &format!("| a | b |\n|---|---|\n| {fits} | {wide} |\n"));
        assert!(found.len() == 1 && found[0].starts_with("a.md:3: a cell of 121 columns"), "{found:?}");
    }

    #[test]
    fn an_escaped_bar_does_not_end_a_cell() {
        assert_eq!(cells(r"| a \| b | c |").map(str::trim).collect::<Vec<_>>(), ["", r"a \| b", "c", ""]);
    }
}
