//! Golden tests: Kubernetes objects in, a dump of every table of one node out.
//!
//! The cases are in `tests/suite/golden`, whose README describes their files. Objects take the
//! agent's own path: manifest parser, state, compiler, reconciler. Only the tables are in memory.

mod case;
mod diff;
mod dump;
mod node;
mod text;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_testkit::run;

use self::{
    case::Case,
    node::{Node, Order},
};

/// What writes the dumps of all cases anew.
const UPDATE: &str = "DATAPLANE_UPDATE_GOLDEN=1 cargo xtask test --filter golden";
const EXPECTED: &str = "tables.txt";
/// The case without objects of its own.
const DEFAULT_CLUSTER: &str = "default_cluster";
/// Fewer cases than this: some were not found.
const CASES_MIN: usize = 25;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// The directories of the cases, sorted.
fn cases() -> Result<Vec<PathBuf>> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(directory()).context("read tests/suite/golden")? {
        let path = entry?.path();
        if path.is_dir() {
            cases.push(path);
        }
    }
    cases.sort();
    Ok(cases)
}

/// The dump of a case, which must not depend on the order of its objects.
fn dump_of(directory: &Path) -> Result<String> {
    let case = Case::read(directory)?;
    let is_default = directory.ends_with(DEFAULT_CLUSTER);
    let default_cluster = if is_default { None } else { Some(default_cluster()?) };
    let dump_in = |order| dump::dump(&Node::with(&case, order)?, default_cluster.as_ref());
    let dump = dump_in(Order::File)?;
    for order in [Order::Reverse, Order::AtOnce] {
        let other = dump_in(order)?;
        ensure!(
            dump == other,
            "the tables depend on the order of the objects ({order:?}, + lines):\n{}",
            diff::diff(&dump, &other)
        );
    }
    Ok(dump)
}

fn default_cluster() -> Result<Node> {
    Node::with(&Case::read(&directory().join(DEFAULT_CLUSTER))?, Order::File)
}

/// Compares the dump of a case with the expected one, or writes it. Returns whether it was written.
fn check(directory: &Path, update: bool) -> Result<bool> {
    let dump = dump_of(directory)?;
    let path = directory.join(EXPECTED);
    let expected = fs::read_to_string(&path).unwrap_or_default();
    if dump == expected {
        return Ok(false);
    }
    if update {
        fs::write(&path, dump).with_context(|| format!("write {}", path.display()))?;
        return Ok(true);
    }
    bail!("the tables differ from {EXPECTED} (- expected, + found):\n{}", diff::diff(&expected, &dump))
}

#[test]
fn tables_are_as_expected() -> Result<()> {
    let update = env::var("DATAPLANE_UPDATE_GOLDEN").is_ok_and(|value| value == "1");
    let cases = cases()?;
    ensure!(cases.len() >= CASES_MIN, "found only {} cases in {}", cases.len(), directory().display());
    let (mut written, mut failed) = (Vec::new(), Vec::new());
    for path in &cases {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match check(path, update) {
            Ok(false) => {}
            Ok(true) => written.push(name.into_owned()),
            Err(error) => failed.push(format!("{name}: {error:#}")),
        }
    }
    if !written.is_empty() {
        run::summarize(&format!("golden: wrote {EXPECTED} of {}", written.join(", ")));
    }
    ensure!(
        failed.is_empty(),
        "{} of {} cases failed\n\n{}\nIf the change is intended, update the files and review their diff:\n    {UPDATE}",
        failed.len(),
        cases.len(),
        failed.join("\n")
    );
    Ok(())
}

#[test]
fn changed_row_is_reported_with_its_difference() -> Result<()> {
    let copy = tempfile::tempdir()?;
    fs::copy(directory().join("cluster_ip/objects.yaml"), copy.path().join("objects.yaml"))?;
    ensure!(
        check(copy.path(), true)? && !check(copy.path(), false)?,
        "the written dump is not the expected one"
    );
    let tables = copy.path().join(EXPECTED);
    let changed = fs::read_to_string(&tables)?.replace("10.1.2.11:8080", "10.1.2.99:8080");
    fs::write(&tables, changed)?;

    let Err(error) = check(copy.path(), false) else { bail!("the changed row was not found") };
    let message = format!("{error:#}");
    let found = |sign: char, backend: &str| {
        message.lines().any(|line| line.starts_with(sign) && line.contains(backend))
    };
    ensure!(found('-', "10.1.2.99:8080") && found('+', "10.1.2.11:8080"), "{message}");
    Ok(())
}
