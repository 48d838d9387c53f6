//! The subject of every commit under review is at most 72 columns wide.
//!
//! Under review is what HEAD has and the base has not. The base is the first of these that exists:
//!
//! 1. `DATAPLANE_LINT_BASE`: a commit, branch or tag; CI can set it to the commit before a push;
//! 2. `GITHUB_BASE_REF`: the target branch of a pull request, which GitHub sets, as
//!    `origin/<branch>`;
//! 3. `origin/main`, then `main`.
//!
//! On the main branch itself the base has everything that HEAD has: then the whole history is the
//! range. Whatever the range, a commit is exempt if its author's date is not after [`RULE_SINCE`]:
//! older subjects are longer and cannot be changed. A date, unlike the hash of a commit, also
//! exists in a shallow clone and survives a rebase. Merge commits are exempt: their subjects are
//! written by tools.

use std::{env, path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::{Outcome, outcome};
use crate::{process, workspace};

const COLUMNS: usize = 72;

/// The author's date, in seconds since 1970, of the last commit before this rule.
const RULE_SINCE: u64 = 1_795_843_703;

pub(super) fn check() -> Result<Outcome> {
    let range = match base()? {
        Some(base) => format!("{base}..HEAD"),
        None => "HEAD".to_owned(),
    };
    let log = git(&["log", "--no-merges", "--format=%h%x09%at%x09%s", &range])?;
    let subjects = under_review(&log);
    match outcome("commit subjects are too long", &too_long(&subjects))? {
        Outcome::Ok if is_shallow()? => Ok(Outcome::Note(format!(
            "      shallow clone: {} commits were checked; fetch the whole history to check all",
            subjects.len()
        ))),
        outcome => Ok(outcome),
    }
}

/// The commit at which HEAD left its base. None where there is no base, or where it has all that
/// HEAD has.
fn base() -> Result<Option<String>> {
    if let Some(name) = variable("DATAPLANE_LINT_BASE") {
        let base = git(&["merge-base", &name, "HEAD"]);
        let base = base.with_context(|| format!("DATAPLANE_LINT_BASE={name}: not a base of HEAD"))?;
        return Ok(Some(base.trim().to_owned()));
    }
    let head = git(&["rev-parse", "HEAD"])?;
    let target = variable("GITHUB_BASE_REF").map(|branch| format!("origin/{branch}"));
    let mut names = target.into_iter().chain(["origin/main".to_owned(), "main".to_owned()]);
    let base = names.find_map(|name| git(&["merge-base", &name, "HEAD"]).ok());
    Ok(base.filter(|base| *base != head).map(|base| base.trim().to_owned()))
}

/// A variable of the environment that is set. CI systems write "none" as nothing, or as a hash of
/// zeros.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| value.bytes().any(|byte| byte != b'0'))
}

fn is_shallow() -> Result<bool> {
    let path = git(&["rev-parse", "--git-path", "shallow"])?;
    Ok(workspace::root().join(Path::new(path.trim())).exists())
}

fn git(arguments: &[&str]) -> Result<String> {
    process::output(Command::new("git").current_dir(workspace::root()).args(arguments))
}

/// Hash and subject of each commit of `log` (lines of hash, author's date, subject) that the rule
/// applies to.
fn under_review(log: &str) -> Vec<(&str, &str)> {
    log.lines()
        .filter_map(|line| {
            let (hash, line) = line.split_once('\t')?;
            let (date, subject) = line.split_once('\t')?;
            let is_new = date.parse::<u64>().is_ok_and(|date| date > RULE_SINCE);
            // in a shallow clone, git does not know that the oldest commit is a merge
            (is_new && !subject.starts_with("Merge ")).then_some((hash, subject))
        })
        .collect()
}

fn too_long(subjects: &[(&str, &str)]) -> Vec<String> {
    subjects
        .iter()
        .filter_map(|(hash, subject)| {
            let columns = subject.chars().count();
            (columns > COLUMNS).then(|| {
                format!(
                    "{hash}: {columns} columns, {COLUMNS} are allowed; shorten it by `git commit --amend` or \
                     `git rebase --interactive` and move the rest into the body: {subject}"
                )
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_subjects_of_new_commits_are_reported() {
        let long = "x".repeat(COLUMNS + 1);
        let fits = "ü".repeat(COLUMNS);
        let new = RULE_SINCE + 1;
        let log = format!(
            "a1\t{new}\t{long}\nb2\t{new}\t{fits}\nc3\t{RULE_SINCE}\t{long}\nd4\t{new}\tMerge {long} into {long}\n"
        );
        let subjects = under_review(&log);
        assert_eq!(subjects.iter().map(|(hash, _)| *hash).collect::<Vec<_>>(), ["a1", "b2"]);
        let found = too_long(&subjects);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("a1: 73 columns, 72 are allowed"), "{}", found[0]);
    }

    #[test]
    fn a_subject_may_contain_tabs() {
        let log = format!("a1\t{}\tone\ttwo\n", RULE_SINCE + 1);
        assert_eq!(under_review(&log), [("a1", "one\ttwo")]);
    }
}
