//! `lint`: everything that can be said about the repository without running it. All checks run; the
//! command fails if one of them did. What a check finds is printed as
//! `file:line: what is wrong; what to do`.
//!
//! Checks of text come first: they need no compiler and take about a second together.

mod adr;
mod boundaries;
mod comments;
mod commits;
mod dependencies;
mod licenses;
mod links;
mod markdown;
mod sizes;
mod source;
mod spelling;
mod words;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{process, setup, workspace};

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Run only the checks that compile nothing
    #[arg(long)]
    text: bool,
}

/// The name of a check and its function.
type Check = (&'static str, fn() -> Result<Outcome>);

/// The result of a check that did not fail.
#[derive(Debug)]
pub(crate) enum Outcome {
    Ok,
    /// Ok, with a remark for the reader.
    Note(String),
}

/// The documentation is for readers of the code: it includes private items, so links to them are
/// allowed.
const DOCUMENTATION: &str = "-Dwarnings -Arustdoc::private-intra-doc-links";

const TEXT: [Check; 12] = [
    ("commit subjects", commits::check),
    ("format", format),
    ("file sizes", sizes::check),
    ("comments", comments::check),
    ("Markdown", markdown::check),
    ("links", links::check),
    ("decision records", adr::check),
    ("renamed words", words::check),
    ("spelling", spelling::check),
    ("dependencies", dependencies::check),
    ("boundaries", boundaries::check),
    ("licenses", licenses::check),
];

const COMPILED: [Check; 4] = [
    ("clippy", clippy),
    ("clippy of the eBPF crate", clippy_ebpf),
    ("documentation", documentation),
    ("documentation of the eBPF crate", documentation_ebpf),
];

pub(crate) fn run(arguments: &Args) -> Result<()> {
    let mut failed = Vec::new();
    let compiled = if arguments.text { &[][..] } else { &COMPILED };
    for (name, check) in TEXT.iter().chain(compiled) {
        let start = Instant::now();
        let result = check();
        let took = start.elapsed();
        match result {
            Ok(Outcome::Ok) => println!("ok    {name} ({took:.1?})"),
            Ok(Outcome::Note(note)) => println!("ok    {name} ({took:.1?})\n{note}"),
            Err(error) => {
                println!("FAIL  {name} ({took:.1?}): {error:#}");
                failed.push(*name);
            }
        }
    }
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Fails with everything that was `found`, one a line, below a `title`.
fn outcome(title: &str, found: &[String]) -> Result<Outcome> {
    if !found.is_empty() {
        bail!("{title} ({}):\n  {}", found.len(), found.join("\n  "));
    }
    Ok(Outcome::Ok)
}

/// Path and content of every file with this extension; paths are relative to the top directory.
fn read(extension: &str) -> Result<Vec<(PathBuf, String)>> {
    let files = workspace::files(extension)?.into_iter();
    files.map(|file| read_file(&file).map(|text| (file, text))).collect()
}

fn read_file(file: &Path) -> Result<String> {
    fs::read_to_string(workspace::root().join(file)).with_context(|| format!("read {}", file.display()))
}

/// Numbered lines of Markdown outside fenced code blocks.
fn prose(markdown: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_code = false;
    markdown.lines().enumerate().map(|(index, line)| (index + 1, line)).filter(move |(_, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    })
}

/// The width of a line of text. A character has one column: the tree has no wide ones.
fn columns(line: &str) -> usize {
    line.chars().count()
}

/// Whether a line cannot be wrapped: apart from a list marker it is one link, URL or code span.
fn is_unbreakable(line: &str) -> bool {
    let text = line.trim_start().trim_start_matches(['-', '*', '>']).trim();
    let is_url = text.contains("://") && text.split_whitespace().count() == 1;
    let is_definition = text.starts_with('[') && text.contains("]: ");
    let is_link = text.starts_with(['[', '!']) && text.contains("](") && text.ends_with(')');
    let is_code = text.starts_with('`') && text.split_whitespace().count() == 1;
    is_url || is_code || is_definition || is_link && text.matches("](").count() == 1
}

fn format() -> Result<Outcome> {
    process::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;
    Ok(Outcome::Ok)
}

/// With the real eBPF object where it can be built: then the tests need not run the agent's build
/// script again.
fn clippy() -> Result<Outcome> {
    let mut cargo = workspace::cargo();
    cargo.args(["clippy", "--keep-going"]).args(workspace::FOR_HOST);
    cargo.args(["--all-targets", "--", "-Dwarnings"]);
    process::run(without_object_if_need_be(&mut cargo))?;
    Ok(Outcome::Ok)
}

/// For the host: the same code, without a second toolchain's clippy and a second `core`. In
/// release, because that profile aborts on panic, as BPF does.
fn clippy_ebpf() -> Result<Outcome> {
    process::run(workspace::cargo().args([
        "clippy",
        "--release",
        "--package",
        workspace::EBPF,
        "--",
        "-Dwarnings",
    ]))?;
    Ok(Outcome::Ok)
}

fn documentation() -> Result<Outcome> {
    let mut cargo = workspace::cargo();
    cargo.args(["doc", "--no-deps", "--document-private-items"]).args(workspace::FOR_HOST);
    process::run(without_object_if_need_be(cargo.env("RUSTDOCFLAGS", DOCUMENTATION)))?;
    Ok(Outcome::Ok)
}

fn documentation_ebpf() -> Result<Outcome> {
    let mut cargo = workspace::cargo();
    cargo.args(["doc", "--no-deps", "--document-private-items", "--release", "--package", workspace::EBPF]);
    process::run(cargo.env("RUSTDOCFLAGS", DOCUMENTATION))?;
    Ok(Outcome::Ok)
}

/// Leaves the eBPF object out where this machine cannot build it.
fn without_object_if_need_be(cargo: &mut Command) -> &mut Command {
    if setup::can_build_ebpf() { cargo } else { cargo.env("AYA_BUILD_SKIP", "1") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_lists_all_it_found() {
        assert!(matches!(outcome("faults", &[]), Ok(Outcome::Ok)));
        let error = outcome("faults", &["a:1: x".to_owned(), "b:2: y".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "faults (2):\n  a:1: x\n  b:2: y");
    }

    #[test]
    fn code_blocks_are_no_prose() {
        let lines: Vec<_> = prose("a\n```sh\nb\n```\nc\n").collect();
        assert_eq!(lines, [(1, "a"), (5, "c")]);
    }

    #[test]
    fn lines_of_a_single_link_are_unbreakable() {
        for line in ["- [a b](c.md)", "<https://example.org/>", "[a]: https://example.org/ \"title\""] {
            assert!(is_unbreakable(line), "{line}");
        }
        for line in ["see https://example.org/", "[a](b) and [c](d)", "text"] {
            assert!(!is_unbreakable(line), "{line}");
        }
    }
}
