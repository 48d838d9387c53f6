//! The test binaries: built by cargo, which tells where they are.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::{process, workspace};

/// The package whose tests load programs and make clusters; the rest needs no privilege, or skips by itself.
const TESTS: &str = "dataplane-tests";
/// Its tests that run programs on packets: they share nothing with anyone.
const PROGRAM_TESTS: &str = "prog_";

/// One executable full of tests.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Binary {
    /// As it is shown: `package` for a crate's own tests, `package/file` for a file of its `tests/`.
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
    /// The package's directory, where tests run.
    pub(crate) directory: PathBuf,
    pub(crate) runs_alone: bool,
    pub(crate) needs_root: bool,
    /// Only these tests, if not all.
    pub(crate) only: Option<Vec<String>>,
}

/// A message of cargo's; of other kinds only the reason is read.
#[derive(Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
enum Message {
    CompilerArtifact(Artifact),
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Artifact {
    manifest_path: PathBuf,
    target: Target,
    profile: Profile,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds all tests, and the programs they start.
pub(crate) fn build() -> Result<Vec<Binary>> {
    build_selected(&["--lib", "--bins", "--tests"])
}

/// Builds these targets, in cargo's words, of whichever package has them.
pub(crate) fn build_selected(targets: &[&str]) -> Result<Vec<Binary>> {
    let mut cargo = workspace::cargo();
    cargo.arg("build").args(workspace::FOR_HOST).args(targets);
    cargo.arg("--message-format=json-render-diagnostics");
    eprintln!("$ {}", process::line(&cargo));
    let text = messages(&mut cargo)?;
    let mut binaries = Vec::new();
    for line in text.lines() {
        let message: Message =
            serde_json::from_str(line).with_context(|| format!("read cargo's message {line}"))?;
        binaries.extend(binary(message));
    }
    binaries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(binaries)
}

/// What cargo prints; its progress and its diagnostics are seen meanwhile.
fn messages(cargo: &mut Command) -> Result<String> {
    let output = cargo.stderr(Stdio::inherit()).output().context("run cargo")?;
    if !output.status.success() {
        bail!("{}: {}", process::line(cargo), output.status);
    }
    String::from_utf8(output.stdout).context("read the output of cargo")
}

fn binary(message: Message) -> Option<Binary> {
    let Message::CompilerArtifact(artifact) = message else { return None };
    let executable = artifact.executable.filter(|_| artifact.profile.test)?;
    let directory = artifact.manifest_path.parent()?.to_owned();
    let package = directory.file_name()?.to_string_lossy().into_owned();
    let package = if package == "tests" { TESTS.to_owned() } else { package };
    let file = artifact.target.name;
    let is_file = artifact.target.kind.iter().any(|kind| kind == "test");
    let is_of_tests = is_file && package == TESTS;
    Some(Binary {
        name: if is_file || file.replace('_', "-") != package {
            format!("{package}/{file}")
        } else {
            package
        },
        executable,
        directory,
        runs_alone: is_of_tests && !file.starts_with(PROGRAM_TESTS),
        needs_root: is_of_tests,
        only: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Option<Binary> {
        binary(serde_json::from_str(line).expect("cargo's form"))
    }

    #[test]
    fn a_cluster_test_runs_alone_and_as_root() {
        let line = r#"{"reason":"compiler-artifact","package_id":"p","manifest_path":"/w/tests/Cargo.toml",
            "target":{"kind":["test"],"crate_types":["bin"],"name":"netns_services","src_path":"/w/t.rs"},
            "profile":{"opt_level":"1","test":true},"features":[],"executable":"/w/target/debug/deps/n-1"}"#;
        let binary = read(line).expect("a test binary");
        assert_eq!(binary.name, "dataplane-tests/netns_services");
        assert!(binary.runs_alone && binary.needs_root);
    }

    #[test]
    fn a_crates_own_tests_have_its_name_and_run_beside_others() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/w/dataplane-cni/Cargo.toml",
            "target":{"kind":["lib"],"name":"dataplane_cni"},
            "profile":{"test":true},"executable":"/w/target/debug/deps/c-1"}"#;
        let binary = read(line).expect("a test binary");
        assert_eq!(binary.name, "dataplane-cni");
        assert!(!binary.runs_alone && !binary.needs_root);
    }

    #[test]
    fn programs_and_other_messages_are_no_tests() {
        let program = r#"{"reason":"compiler-artifact","manifest_path":"/w/dataplane-cni/Cargo.toml",
            "target":{"kind":["bin"],"name":"dataplane-cni"},
            "profile":{"test":false},"executable":"/w/target/debug/dataplane-cni"}"#;
        assert_eq!(read(program), None);
        assert_eq!(read(r#"{"reason":"build-finished","success":true}"#), None);
    }
}
