//! The packages whose code is in the image, with their licenses and dependencies.
//!
//! `cargo tree` lists the packages that are linked (not build tools and macros), `cargo metadata`
//! has their manifests, and the lock file has their checksums.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::binaries::{PROGRAMS, Target};
use crate::{process, workspace};

/// Prefixes of the names of license files.
const LICENCE_FILES: [&str; 4] = ["LICENSE", "LICENCE", "COPYING", "NOTICE"];

/// A package that is linked.
#[derive(Debug)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    /// License as SPDX expression.
    pub(super) license: Option<String>,
    /// SHA-256 of the package in the registry; none for packages of the workspace.
    pub(super) checksum: Option<String>,
    /// Indices of its dependencies in the list of packages.
    pub(super) dependencies: Vec<usize>,
    directory: PathBuf,
}

impl Package {
    pub(super) fn is_member(&self) -> bool {
        self.checksum.is_none()
    }
}

/// The packages in the image.
pub(super) fn linked(target: &Target) -> Result<Vec<Package>> {
    let names = tree(target)?;
    let lock = workspace::root().join("Cargo.lock");
    let lock = fs::read_to_string(&lock).with_context(|| format!("read {}", lock.display()))?;
    let checksums = checksums(&lock);
    select(workspace::metadata()?, &names, &checksums)
}

/// Names and versions of linked packages. The eBPF crate is listed separately: the agent embeds its
/// object and does not depend on it.
fn tree(target: &Target) -> Result<BTreeSet<(String, String)>> {
    let mut cargo = workspace::cargo();
    cargo.args(["tree", "--locked", "--target", &target.triple, "--edges", "normal,no-proc-macro"]);
    cargo.args(["--prefix", "none", "--format", "{p}"]);
    for package in PROGRAMS.iter().chain(&[workspace::EBPF]) {
        cargo.args(["--package", package]);
    }
    let text = process::output(&mut cargo)?;
    Ok(text.lines().filter_map(name_and_version).collect())
}

/// Name and version in a line as `serde v1.0.228 (*)`.
fn name_and_version(line: &str) -> Option<(String, String)> {
    let mut words = line.split(' ');
    let (name, version) = (words.next()?, words.next()?);
    Some((name.to_owned(), version.strip_prefix('v')?.to_owned()))
}

fn select(
    metadata: &Value,
    names: &BTreeSet<(String, String)>,
    checksums: &BTreeMap<(String, String), String>,
) -> Result<Vec<Package>> {
    let mut ids = Vec::new();
    let mut packages = Vec::new();
    let all = metadata["packages"].as_array().context("cargo metadata: packages")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for package in all {
        let key = (text(&package["name"]), text(&package["version"]));
        if names.contains(&key) {
            ids.push(text(&package["id"]));
            let manifest = PathBuf::from(text(&package["manifest_path"]));
            packages.push(Package {
                license: package["license"].as_str().map(|license| license.replace('/', " OR ")),
                checksum: checksums.get(&key).cloned(),
                dependencies: Vec::new(),
                directory: manifest.parent().unwrap_or(Path::new("/")).to_owned(),
                name: key.0,
                version: key.1,
            });
        }
    }
    let nodes = metadata["resolve"]["nodes"].as_array().context("cargo metadata: resolve")?;
    for node in nodes {
        let Some(at) = ids.iter().position(|id| node["id"] == id.as_str()) else { continue };
        let normal = |dependency: &&Value| {
            let kinds = dependency["dep_kinds"].as_array();
            kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
        };
        let needs = node["deps"].as_array().into_iter().flatten().filter(normal);
        packages[at].dependencies =
            needs.filter_map(|need| ids.iter().position(|id| need["pkg"] == id.as_str())).collect();
    }
    Ok(packages)
}

/// The checksums in the lock file, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let value = |block: &str, key: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \""));
        line.and_then(|rest| rest.strip_suffix('"')).map(str::to_owned)
    };
    let blocks = lock.split("[[package]]").skip(1);
    let entry = |block| Some(((value(block, "name")?, value(block, "version")?), value(block, "checksum")?));
    blocks.filter_map(entry).collect()
}

/// The licenses of packages from the registry: each text once, with the packages that have it.
pub(super) fn licenses(packages: &[Package]) -> Result<String> {
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in packages.iter().filter(|package| !package.is_member()) {
        let name = format!("{} {}", package.name, package.version);
        let directory = fs::read_dir(&package.directory)
            .with_context(|| format!("read {}", package.directory.display()))?;
        for entry in directory {
            let entry = entry?;
            let file = entry.file_name().to_string_lossy().to_uppercase();
            if entry.path().is_file() && LICENCE_FILES.iter().any(|start| file.starts_with(start)) {
                let text =
                    fs::read(entry.path()).with_context(|| format!("read {}", entry.path().display()))?;
                let text = String::from_utf8_lossy(&text).replace('\r', "");
                texts.entry(text.trim().to_owned()).or_default().insert(name.clone());
            }
        }
    }
    let mut sections: Vec<(BTreeSet<String>, String)> =
        texts.into_iter().map(|(text, names)| (names, text)).collect();
    sections.sort();
    let mut all =
        "Parts of the programs in this image are the work of others, under these licenses.\n".to_owned();
    for (names, text) in sections {
        let names = names.into_iter().collect::<Vec<_>>().join(", ");
        write!(all, "\n==== {names}\n\n{text}\n")?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn linked_packages_have_checksum_license_and_dependencies() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nchecksum = \"abc\"\n\n\
                    [[package]]\nname = \"ours\"\nversion = \"0.1.0\"\ndependencies = [\n \"a\",\n]\n";
        let package = |name: &str, version: &str, license: &str| {
            let id = format!("{name}@{version}");
            json!({ "name": name, "version": version, "id": id, "license": license, "manifest_path": "/x/Cargo.toml" })
        };
        let need = |id: &str, kind: Value| json!({ "pkg": id, "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "packages": [
                package("a", "1.0.0", "MIT/Apache-2.0"), package("b", "2.0.0", "MIT"), package("ours", "0.1.0", "MIT"),
            ],
            "resolve": { "nodes": [{
                "id": "ours@0.1.0",
                "deps": [need("a@1.0.0", Value::Null), need("b@2.0.0", json!("build"))],
            }] },
        });
        let tree = "ours v0.1.0 (/src/ours)\na v1.0.0\na v1.0.0 (*)\n\n";
        let names: BTreeSet<_> = tree.lines().filter_map(name_and_version).collect();
        let packages = select(&metadata, &names, &checksums(lock)).unwrap();
        assert_eq!(packages.len(), 2, "{packages:?}");
        assert_eq!(packages[0].license.as_deref(), Some("MIT OR Apache-2.0"));
        assert_eq!(packages[0].checksum.as_deref(), Some("abc"));
        assert!(packages[1].is_member() && packages[1].dependencies == [0]);
    }
}
