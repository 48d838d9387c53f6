//! Licenses of all dependencies. Where `cargo-deny` is installed, it checks them, with advisories
//! and sources; otherwise the allow list of deny.toml is applied here.

use std::fs;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::Outcome;
use crate::{process, workspace};

pub(super) fn check() -> Result<Outcome> {
    if process::find("cargo-deny").is_some() {
        process::run(workspace::cargo().args(["deny", "--workspace", "check"]))?;
        return Ok(Outcome::Ok);
    }
    let policy = fs::read_to_string(workspace::root().join("deny.toml")).context("read deny.toml")?;
    let allowed = allow_list(&policy).context("deny.toml: no `allow` under [licenses]")?;
    let packages = workspace::metadata()?["packages"].as_array().context("cargo metadata: packages")?;
    let refused: Vec<String> = packages.iter().filter_map(|package| refusal(package, &allowed)).collect();
    if !refused.is_empty() {
        bail!(
            "dependencies have licenses that deny.toml does not allow; replace them, or extend `allow`:\n  {}",
            refused.join("\n  ")
        );
    }
    Ok(Outcome::Note(
        "      only licenses were checked: cargo-deny, which checks advisories, bans and sources, is not installed".to_owned(),
    ))
}

/// Name, version and license of a package whose license is not allowed.
fn refusal(package: &Value, allowed: &[&str]) -> Option<String> {
    let license = package["license"].as_str().unwrap_or("none");
    let is_member = package["source"].is_null();
    (!is_member && !is_allowed(license, allowed))
        .then(|| format!("{} {}: {license}", package["name"], package["version"]))
}

/// The strings of `allow = [..]` in the table `[licenses]`.
fn allow_list(policy: &str) -> Option<Vec<&str>> {
    let (_, table) = policy.split_once("[licenses]")?;
    let (_, list) = table.split_once("allow = [")?;
    let (list, _) = list.split_once(']')?;
    Some(list.split('"').skip(1).step_by(2).collect())
}

/// Whether the license expression (SPDX) offers a choice that is allowed. `OR` binds weaker than
/// `AND`.
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    // old crates write a slash for "or"
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    any(&mut words.as_slice(), allowed)
}

fn any(words: &mut &[&str], allowed: &[&str]) -> bool {
    let mut result = all(words, allowed);
    while let [first, rest @ ..] = *words
        && *first == "OR"
    {
        *words = rest;
        result |= all(words, allowed);
    }
    result
}

fn all(words: &mut &[&str], allowed: &[&str]) -> bool {
    let mut result = one(words, allowed);
    while let [first, rest @ ..] = *words
        && *first == "AND"
    {
        *words = rest;
        result &= one(words, allowed);
    }
    result
}

fn one(words: &mut &[&str], allowed: &[&str]) -> bool {
    match **words {
        ["(", ..] => {
            *words = &words[1..];
            let result = any(words, allowed);
            // the closing parenthesis
            *words = words.get(1..).unwrap_or_default();
            result
        }
        [license, "WITH", exception, ..] => {
            *words = &words[3..];
            allowed.contains(&format!("{license} WITH {exception}").as_str())
        }
        [license, ..] => {
            *words = &words[1..];
            allowed.contains(&license)
        }
        [] => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: [&str; 3] = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"];

    #[test]
    fn one_choice_must_be_allowed_in_all_its_parts() {
        for good in [
            "MIT",
            "GPL-2.0 OR MIT",
            "MIT/Unlicense",
            "(MIT OR GPL-3.0) AND Apache-2.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(is_allowed(good, &ALLOWED), "{good}");
        }
        for bad in ["GPL-2.0", "MIT AND GPL-2.0", "(MIT OR Apache-2.0) AND GPL-3.0", "none", ""] {
            assert!(!is_allowed(bad, &ALLOWED), "{bad}");
        }
    }

    #[test]
    fn the_allow_list_is_read_from_the_licenses_table() {
        let policy = "[bans]\nallow = []\n[licenses]\nallow = [\n  \"MIT\",\n  \"ISC\",\n]\n";
        assert_eq!(allow_list(policy), Some(vec!["MIT", "ISC"]));
    }
}
