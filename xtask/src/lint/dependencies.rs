//! Every declared dependency is used: a crate that a member declares is named in its code, and what
//! `[workspace.dependencies]` lists has a member that takes it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Outcome, outcome, read, read_file, source};
use crate::workspace;

/// Dependencies that no code names: member, dependency, and why it is declared.
const KEPT: &[(&str, &str, &str)] = &[
    ("dataplane-agent", "bytes", "one of the crates that the project is specified to be built on"),
    ("xtask", "typos-dict", "`spelling` reads its word list as text"),
];

pub(super) fn check() -> Result<Outcome> {
    let root = workspace::root();
    let metadata = workspace::metadata()?;
    let ids = metadata["workspace_members"].as_array().context("cargo metadata: workspace_members")?;
    let packages = metadata["packages"].as_array().context("cargo metadata: packages")?;
    let members: Vec<(PathBuf, &Value)> = packages
        .iter()
        .filter(|package| ids.contains(&package["id"]))
        .filter_map(|package| {
            let manifest = Path::new(package["manifest_path"].as_str()?);
            Some((manifest.parent()?.strip_prefix(root).ok()?.to_owned(), package))
        })
        .collect();

    let mut code = vec![String::new(); members.len()];
    for (file, text) in read("rs")? {
        // members can lie within members: a file is part of the innermost
        let owner = members.iter().enumerate().filter(|(_, (directory, _))| file.starts_with(directory));
        if let Some((index, _)) = owner.max_by_key(|(_, (directory, _))| directory.components().count()) {
            for line in source::lines(&text) {
                code[index].push_str(&line.code);
                code[index].push('\n');
            }
        }
    }

    let mut found = Vec::new();
    let mut manifests = Vec::new();
    for ((directory, package), code) in members.iter().zip(&code) {
        let file = directory.join("Cargo.toml");
        let text = read_file(&file)?;
        found.extend(unused(&file, &text, package, code));
        manifests.push(text);
    }
    let file = Path::new("Cargo.toml");
    found.extend(unused_in_workspace(file, &read_file(file)?, &manifests));
    outcome("dependencies are not used", &found)
}

/// Dependencies of one member that its code does not name.
fn unused(file: &Path, manifest: &str, package: &Value, code: &str) -> Vec<String> {
    let member = package["name"].as_str().unwrap_or_default();
    let dependencies = package["dependencies"].as_array().map_or(&[][..], Vec::as_slice);
    dependencies
        .iter()
        .filter_map(|dependency| dependency["rename"].as_str().or(dependency["name"].as_str()))
        .filter(|name| !KEPT.iter().any(|(of, kept, _)| *of == member && kept == name))
        .filter(|name| !names(code, &name.replace('-', "_")))
        .map(|name| {
            format!("{}:{}: {member} does not use {name}; remove it", file.display(), line_of(manifest, name))
        })
        .collect()
}

/// Whether code names a crate: `name::…`, `use name` or `extern crate name`.
fn names(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + name.len()..]);
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        !before.ends_with(is_word)
            && !after.starts_with(is_word)
            && (after.starts_with("::") || before.ends_with("use ") || before.ends_with("extern crate "))
    })
}

/// Entries of `[workspace.dependencies]` that no member takes.
fn unused_in_workspace(file: &Path, text: &str, manifests: &[String]) -> Vec<String> {
    let table = text.lines().enumerate().skip_while(|(_, line)| line.trim() != "[workspace.dependencies]");
    table
        .skip(1)
        .take_while(|(_, line)| !line.starts_with('['))
        .filter_map(|(index, line)| Some((index + 1, key(line)?)))
        .filter(|(_, name)| !manifests.iter().any(|manifest| is_taken(manifest, name)))
        .map(|(number, name)| format!("{}:{number}: no member uses {name}; remove it", file.display()))
        .collect()
}

/// Whether a manifest has `name.workspace = true` or `name = { workspace = true … }`.
fn is_taken(manifest: &str, name: &str) -> bool {
    manifest.lines().any(|line| {
        let Some(rest) = line.strip_prefix(name) else { return false };
        rest.trim_start().starts_with(['.', '=']) && rest.contains("workspace = true")
    })
}

/// The key of a line `key = …` or `key.workspace = …`.
fn key(line: &str) -> Option<&str> {
    let (key, _) = line.split_once(['=', '.'])?;
    let key = key.trim();
    (!key.is_empty() && !key.starts_with('#')).then_some(key)
}

fn line_of(manifest: &str, name: &str) -> usize {
    manifest.lines().position(|line| key(line) == Some(name)).map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dependency_that_no_code_names_is_reported() {
        let manifest = "[dependencies]\nserde_json.workspace = true\nhyper-util.workspace = true\n";
        let package = serde_json::json!({
            "name": "member",
            "dependencies": [{ "name": "serde_json" }, { "name": "hyper-util" }],
        });
        let file = Path::new("member/Cargo.toml");
        let code = "use serde_json::Value;\nlet hyper_util = 1;\n";
        assert_eq!(
            unused(file, manifest, &package, code),
            ["member/Cargo.toml:3: member does not use hyper-util; remove it"]
        );
        assert!(unused(file, manifest, &package, &format!("{code}hyper_util::x();")).is_empty());
    }

    #[test]
    fn only_paths_and_imports_name_a_crate() {
        for code in ["use libc;", "libc::close(1)", "extern crate libc;", "#[libc::test]"] {
            assert!(names(code, "libc"), "{code}");
        }
        for code in ["let libc = 1;", "use my_libc::x;", "libc_extra::x()"] {
            assert!(!names(code, "libc"), "{code}");
        }
    }

    #[test]
    fn an_entry_of_the_workspace_that_no_member_takes_is_reported() {
        let root = "[workspace]\n[workspace.dependencies]\na = \"1\"\n# why\nb-c = { version = \"2\" }\n\n[profile.dev]\nd = 1\n";
        let members = ["a = { workspace = true, features = [\"x\"] }\n".to_owned()];
        let found = unused_in_workspace(Path::new("Cargo.toml"), root, &members);
        assert_eq!(found, ["Cargo.toml:5: no member uses b-c; remove it"]);
        let members = ["a.workspace = true\n".to_owned(), "b-c.workspace = true\n".to_owned()];
        assert!(unused_in_workspace(Path::new("Cargo.toml"), root, &members).is_empty());
    }
}
