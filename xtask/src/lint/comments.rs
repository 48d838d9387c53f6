//! Comments are at most 100 columns wide: `//`, `///` and `//!` in Rust, `#` in TOML, YAML and
//! shell. A run of plain `//` lines has at most three, unless it is a proof: its first word is
//! `SAFETY:` or `Proof:`.
//!
//! A comment behind code may reach as far as the code: 110 columns. Tables and lines that consist
//! of a URL cannot be broken and are exempt. `///`, and `#` in configuration files, may be longer
//! than three lines: they are documentation.

use std::path::Path;

use anyhow::Result;

use super::{Outcome, columns, is_unbreakable, outcome, read, source};

const COLUMNS: usize = 100;
/// `max_width` of rustfmt.toml.
const CODE_COLUMNS: usize = 110;
const LINES: usize = 3;
/// First words of comments that prove something and may be as long as the proof.
const PROOFS: [&str; 2] = ["SAFETY:", "Proof:"];

pub(super) fn check() -> Result<Outcome> {
    let mut found = Vec::new();
    for (file, text) in read("rs")? {
        found.extend(in_rust(&file, &text));
    }
    for extension in ["toml", "yaml", "yml", "sh"] {
        for (file, text) in read(extension)? {
            found.extend(in_configuration(&file, &text));
        }
    }
    outcome("comments are too wide or too long", &found)
}

fn in_rust(file: &Path, text: &str) -> Vec<String> {
    let lines = source::lines(text);
    let mut found = Vec::new();
    for (index, (line, whole)) in lines.iter().zip(text.lines()).enumerate() {
        let Some(comment) = line.comment else { continue };
        let limit = if line.is_comment() { COLUMNS } else { CODE_COLUMNS };
        let content = comment.trim_start_matches(['/', '!']);
        found.extend(too_wide(file, index, whole, content, limit));
    }
    let mut index = 0;
    for run in lines.chunk_by(|a, b| a.is_plain_comment() == b.is_plain_comment()) {
        if run.len() > LINES && run[0].is_plain_comment() && !is_proof(&run[0]) {
            found.push(format!(
                "{}:{}: a comment of {} lines, {LINES} are allowed; keep only the reason, or begin a proof with \
                 `{}`",
                file.display(),
                index + 1,
                run.len(),
                PROOFS.join("` or `")
            ));
        }
        index += run.len();
    }
    found
}

fn is_proof(line: &source::Line<'_>) -> bool {
    let text = line.comment.unwrap_or_default().trim_start_matches('/').trim_start();
    PROOFS.iter().any(|word| text.starts_with(word))
}

fn in_configuration(file: &Path, text: &str) -> Vec<String> {
    let comments = text.lines().enumerate().filter_map(|(index, line)| {
        let content = line.trim_start().strip_prefix('#')?;
        too_wide(file, index, line, content, COLUMNS)
    });
    comments.collect()
}

fn too_wide(file: &Path, index: usize, line: &str, content: &str, limit: usize) -> Option<String> {
    let columns = columns(line);
    let is_table = content.trim_start().starts_with('|');
    (columns > limit && !is_table && !is_unbreakable(content)).then(|| {
        format!("{}:{}: {columns} columns, {limit} are allowed; wrap the comment", file.display(), index + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rust(text: &str) -> Vec<String> {
        in_rust(Path::new("a.rs"), text)
    }

    #[test]
    fn wide_comments_are_reported_and_wide_code_is_not() {
        let wide = "x ".repeat(60);
        assert_eq!(
            rust(&format!("/// {wide}\n")),
            ["a.rs:1: 124 columns, 100 are allowed; wrap the comment"]
        );
        assert_eq!(rust(&format!("\nf(); // {wide}\n")).len(), 1);
        assert!(rust(&format!("let text = \"// {wide}\";\n//! | {wide} |\n")).is_empty());
        assert!(rust(&format!("/// <https://example.org/{}>\n", "x".repeat(100))).is_empty());
    }

    #[test]
    fn long_plain_comments_are_reported_unless_they_are_proofs() {
        let line = "    // text\n";
        assert!(rust(&line.repeat(3)).is_empty());
        let found = rust(&format!("fn f() {{\n{}}}\n", line.repeat(4)));
        assert!(found.len() == 1 && found[0].starts_with("a.rs:2: a comment of 4 lines"), "{found:?}");
        assert!(rust(&format!("    // SAFETY: text\n{}", line.repeat(9))).is_empty());
        assert!(rust(&format!("    // Proof: text\n{}", line.repeat(9))).is_empty());
        assert!(rust(&"/// text\n".repeat(9)).is_empty());
    }

    #[test]
    fn comments_of_configuration_files_are_checked() {
        let text = format!("key: {}\n  # {}\n# short\n", "x".repeat(120), "x ".repeat(60));
        let found = in_configuration(Path::new("a.yaml"), &text);
        assert_eq!(found, ["a.yaml:2: 124 columns, 100 are allowed; wrap the comment"]);
    }
}
