//! The test binaries: built by cargo, which tells where they are.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::{process, workspace};

/// The package whose tests load programs and make clusters; the rest needs no privilege, or skips
/// by itself.
const SUITE: &str = "dataplane-suite";
/// Its tests that run programs on packets: they share nothing with anyone.
const PROGRAM_TESTS: &str = "prog";
/// Its tests that need no privilege, or skip by themselves.
const UNPRIVILEGED: &str = "control_plane";

/// One executable full of tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Binary {
    /// As it is shown: `package` for a crate's own tests, `package/target` for a target of its
    /// `tests/`.
    pub(crate) name: String,
    /// The only module that runs, if not all.
    pub(crate) module: Option<String>,
    pub(crate) executable: PathBuf,
    /// The package's directory, where tests run.
    pub(crate) directory: PathBuf,
    pub(crate) runs_alone: bool,
    pub(crate) needs_root: bool,
    /// Only these tests, if not all.
    pub(crate) only: Option<Vec<String>>,
}

impl Binary {
    /// With the module, if it runs alone.
    pub(crate) fn label(&self) -> String {
        self.module.as_ref().map_or_else(|| self.name.clone(), |module| format!("{}::{module}", self.name))
    }
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
    package_id: String,
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
    let package = package(&artifact.package_id)?.to_owned();
    let target = artifact.target.name;
    let is_test = artifact.target.kind.iter().any(|kind| kind == "test");
    let is_of_suite = is_test && package == SUITE;
    Some(Binary {
        executable,
        directory,
        module: None,
        runs_alone: is_of_suite && target != PROGRAM_TESTS,
        needs_root: is_of_suite && target != UNPRIVILEGED,
        only: None,
        name: if is_test || target.replace('_', "-") != package {
            format!("{package}/{target}")
        } else {
            package
        },
    })
}

/// The package's name: `path+file:///directory#name@version`, or without `name@` where the
/// directory has the same name.
fn package(id: &str) -> Option<&str> {
    let (place, version) = id.rsplit_once('#')?;
    version.split_once('@').map(|(name, _)| name).or_else(|| place.rsplit('/').next())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Option<Binary> {
        binary(serde_json::from_str(line).expect("cargo's form"))
    }

    fn of_suite(target: &str) -> Binary {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/tests/suite#dataplane-suite@0.1.0",
            "manifest_path":"/w/tests/suite/Cargo.toml",
            "target":{"kind":["test"],"crate_types":["bin"],"name":"TARGET","src_path":"/w/t.rs"},
            "profile":{"opt_level":"1","test":true},"features":[],"executable":"/w/target/debug/deps/n-1"}"#;
        read(&line.replace("TARGET", target)).expect("a test binary")
    }

    #[test]
    fn a_cluster_test_runs_alone_and_as_root() {
        let binary = of_suite("netns");
        assert_eq!(binary.name, "dataplane-suite/netns");
        assert!(binary.runs_alone && binary.needs_root);
    }

    #[test]
    fn a_program_test_runs_beside_others_and_as_root() {
        let binary = of_suite("prog");
        assert!(!binary.runs_alone && binary.needs_root);
    }

    #[test]
    fn a_crates_own_tests_have_its_name_and_run_beside_others() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/dataplane-cni#0.1.0",
            "manifest_path":"/w/dataplane-cni/Cargo.toml",
            "target":{"kind":["lib"],"name":"dataplane_cni"},
            "profile":{"test":true},"executable":"/w/target/debug/deps/c-1"}"#;
        let binary = read(line).expect("a test binary");
        assert_eq!(binary.name, "dataplane-cni");
        assert!(!binary.runs_alone && !binary.needs_root);
    }

    #[test]
    fn programs_and_other_messages_are_no_tests() {
        let program = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/dataplane-cni#0.1.0",
            "manifest_path":"/w/dataplane-cni/Cargo.toml",
            "target":{"kind":["bin"],"name":"dataplane-cni"},
            "profile":{"test":false},"executable":"/w/target/debug/dataplane-cni"}"#;
        assert_eq!(read(program), None);
        assert_eq!(read(r#"{"reason":"build-finished","success":true}"#), None);
    }
}
