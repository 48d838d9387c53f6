//! `docs/behaviours.md` and the tests: each behaviour has an item, each test that an item names
//! exists, and each test of this module is in an item.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use regex::Regex;

/// Number of behaviours, counted from 1.
const BEHAVIOURS: usize = 37;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn document() -> Result<String> {
    fs::read_to_string(repository().join("docs/behaviours.md")).context("docs/behaviours.md")
}

/// File and function of each test in the document: `file::function`, with the file relative to
/// `tests/suite/tests` or to the root.
fn named(document: &str) -> Result<Vec<(String, String)>> {
    let name = Regex::new(r"`([a-z_/-]+)::([a-z0-9_]+)`")?;
    Ok(name.captures_iter(document).map(|found| (found[1].to_owned(), found[2].to_owned())).collect())
}

fn functions(file: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let function = Regex::new(r"#\[(?:tokio::)?test[^\n]*\n(?:#\[[^\n]*\n)*(?:async )?fn ([a-z0-9_]+)\(")?;
    Ok(function.captures_iter(&text).map(|found| found[1].to_owned()).collect())
}

#[test]
fn every_listed_test_exists() -> Result<()> {
    let root = repository();
    let named = named(&document()?)?;
    ensure!(named.len() > BEHAVIOURS, "{} tests are named", named.len());
    for (file, function) in named {
        let places =
            [root.join("tests/suite/tests"), root.clone()].map(|place| place.join(format!("{file}.rs")));
        let found = places
            .iter()
            .find(|place| place.exists())
            .with_context(|| format!("file {file} does not exist"))?;
        ensure!(functions(found)?.contains(&function), "{file} has no test {function}");
    }
    Ok(())
}

#[test]
fn every_behaviour_and_every_test_is_listed() -> Result<()> {
    let document = document()?;
    let item = Regex::new(r"(?m)^(\d+)\. ")?;
    let numbers: BTreeSet<usize> =
        item.captures_iter(&document).filter_map(|found| found[1].parse().ok()).collect();
    ensure!(numbers == (1..=BEHAVIOURS).collect(), "{numbers:?}");
    let named: BTreeSet<String> = named(&document)?.into_iter().map(|(_, function)| function).collect();
    let directory = repository().join("tests/suite/tests/netns/behaviours");
    let test = Regex::new(r"#\[test\]\nfn ([a-z0-9_]+)\(")?;
    for entry in fs::read_dir(directory)? {
        let file = entry?.path();
        if file.ends_with("list.rs") {
            continue;
        }
        let text = fs::read_to_string(&file)?;
        for found in test.captures_iter(&text) {
            ensure!(
                named.contains(&found[1]),
                "{} has {}, which docs/behaviours.md does not name",
                file.display(),
                &found[1]
            );
        }
    }
    Ok(())
}
