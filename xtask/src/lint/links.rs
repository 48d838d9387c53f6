//! What Markdown files refer to exists: files and headings that links name, and source files named
//! in `code spans`.

use std::{
    collections::{HashMap, HashSet},
    path::{Component, Path, PathBuf},
};

use anyhow::Result;

use super::{Outcome, outcome, prose, read};
use crate::workspace;

/// Extensions of files that a code span names by their path from the top directory.
const NAMED: [&str; 6] = [".rs", ".md", ".yaml", ".yml", ".toml", ".sh"];

pub(super) fn check() -> Result<Outcome> {
    let files = read("md")?;
    let headings: HashMap<PathBuf, HashSet<String>> =
        files.iter().map(|(file, text)| (file.clone(), anchors(text))).collect();
    let exists = |path: &Path| workspace::root().join(path).exists();
    let mut found = Vec::new();
    for (file, text) in &files {
        found.extend(broken_links(file, text, &headings, exists));
        found.extend(broken_paths(file, text, exists));
    }
    outcome("references lead nowhere", &found)
}

fn broken_links(
    file: &Path,
    text: &str,
    headings: &HashMap<PathBuf, HashSet<String>>,
    exists: impl Fn(&Path) -> bool,
) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        for (path, anchor) in targets(line) {
            let at = format!("{}:{number}", file.display());
            let directory = file.parent().unwrap_or(Path::new(""));
            let target = if path.is_empty() { file.to_owned() } else { normal(&directory.join(path)) };
            if !exists(&target) {
                found.push(format!("{at}: {path} does not exist; correct the link"));
            } else if let Some(known) = headings.get(&target)
                && !anchor.is_empty()
                && !known.contains(anchor)
            {
                found.push(format!("{at}: {} has no heading #{anchor}; correct the link", target.display()));
            }
        }
    }
    found
}

/// Source files that code spans name by their path from the top directory.
fn broken_paths(file: &Path, text: &str, exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let spans = prose(text)
        .flat_map(|(number, line)| line.split('`').skip(1).step_by(2).map(move |span| (number, span)));
    spans
        .filter(|(_, span)| {
            let top = span.split('/').next().unwrap_or_default();
            NAMED.iter().any(|extension| span.ends_with(extension))
                && span.contains('/')
                && !span.contains(['*', '{', ' ', '<', '$'])
                && exists(Path::new(top))
                && !exists(Path::new(span))
        })
        .map(|(number, span)| {
            format!("{}:{number}: {span} does not exist; name the file that took its place", file.display())
        })
        .collect()
}

/// File and anchor of each `[text](file#anchor)` and `[label]: file#anchor`, without those of other
/// sites.
fn targets(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let text = line.split('`').step_by(2);
    let inline = text.flat_map(|text| text.split("](").skip(1)).filter_map(|rest| rest.split_once(')'));
    let definition = line.trim_start().strip_prefix('[').and_then(|rest| rest.split_once("]: "));
    let named = inline.map(|(target, _)| target).chain(definition.map(|(_, target)| target.trim()));
    named
        .map(|target| target.split(' ').next().unwrap_or_default())
        .filter(|target| !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:"))
        .map(|target| target.split_once('#').unwrap_or((target, "")))
}

/// Anchors of a file: of its headings as GitHub makes them, and those that it declares as `id="…"`.
fn anchors(text: &str) -> HashSet<String> {
    let mut anchors = HashSet::new();
    let mut count: HashMap<String, usize> = HashMap::new();
    for (_, line) in prose(text) {
        let title = line.trim_start_matches('#');
        let level = line.len() - title.len();
        if (1..=6).contains(&level) && title.starts_with(' ') {
            let slug = slug(title.trim());
            let seen = count.entry(slug.clone()).or_default();
            anchors.insert(if *seen == 0 { slug } else { format!("{slug}-{seen}") });
            *seen += 1;
        }
        let declared = line.split("id=\"").skip(1).filter_map(|rest| rest.split_once('"'));
        anchors.extend(declared.map(|(id, _)| id.to_owned()));
    }
    anchors
}

/// The anchor of a heading: lower case, spaces as hyphens, without links and punctuation.
fn slug(title: &str) -> String {
    let mut text = String::new();
    let mut rest = title;
    while let Some((before, after)) = rest.split_once("](") {
        text.push_str(before);
        rest = after.split_once(')').map_or("", |(_, rest)| rest);
    }
    text.push_str(rest);
    text.chars()
        .filter(|c| c.is_alphanumeric() || "-_ ".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .flat_map(char::to_lowercase)
        .collect()
}

/// `path` without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                result.pop();
            }
            Component::CurDir => {}
            other => result.push(other),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_outside_code_and_to_this_repository_are_targets() {
        let line = "[a](docs/a.md#part) [b](https://b.example/) [c](#here) `[d](d.md)` [e](e.md \"title\") ![g](g.png)";
        let found: Vec<_> = targets(line).collect();
        assert_eq!(found, [("docs/a.md", "part"), ("", "here"), ("e.md", ""), ("g.png", "")]);
        assert_eq!(targets("[label]: ../a.md#b").collect::<Vec<_>>(), [("../a.md", "b")]);
    }

    #[test]
    fn missing_files_and_headings_are_reported() {
        let files = [("docs/a.md", "# One\n## Two `x_y`: z\n## One\n"), ("README.md", "# Top\n")];
        let headings = files.iter().map(|(file, text)| (PathBuf::from(file), anchors(text))).collect();
        let exists = |path: &Path| files.iter().any(|(file, _)| Path::new(file) == path);
        let good = "[x](../README.md#top) [x](#one-1) [x](a.md#two-x_y-z)\n```\n[x](none.md)\n```\n";
        let file = Path::new("docs/a.md");
        assert!(broken_links(file, good, &headings, exists).is_empty());
        let found = broken_links(file, "\n[x](none.md) [x](#none)\n", &headings, exists);
        assert_eq!(
            found,
            [
                "docs/a.md:2: none.md does not exist; correct the link",
                "docs/a.md:2: docs/a.md has no heading #none; correct the link"
            ]
        );
    }

    #[test]
    fn missing_source_files_in_code_spans_are_reported() {
        let exists = |path: &Path| path == Path::new("tests") || path == Path::new("tests/a.rs");
        let text = "`tests/a.rs` `other/b.rs` `b.rs` `tests/prog_*.rs` `tests/c.rs`\n";
        let found = broken_paths(Path::new("a.md"), text, exists);
        assert_eq!(found, ["a.md:1: tests/c.rs does not exist; name the file that took its place"]);
    }
}
