//! `image`: the container image, as one file that container runtimes import. It contains only
//! static programs. Needs no network, no daemon and no other tool. The same commit, tools and
//! directories give the same bytes.

mod binaries;
mod check;
mod digest;
mod layer;
mod layout;
mod packages;
pub(crate) mod rustc;
mod sbom;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use binaries::{PROGRAMS, Target};
use layer::Files;
use layout::Description;

use crate::{process, workspace};

/// The name in the manifests of `deploy/`. The domain does not exist, so that a missing image is
/// not pulled from a stranger's registry.
const NAME: &str = "dataplane.local/dataplane";

/// Largest size of the image's files in bytes, unpacked.
const LARGEST: u64 = 40_000_000;

/// Path of the SBOM in the image.
const SBOM: &str = "usr/share/sbom/dataplane.spdx.json";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// File to write, or the directory to write it to [default: target/image]
    #[arg(long, value_name = "FILE|DIR")]
    output: Option<PathBuf>,
    /// Name of the image, or only its tag [default: dataplane.local/dataplane:VERSION]
    #[arg(long, value_name = "TAG")]
    tag: Option<String>,
    /// Rust target triple, for example with musl; compiles everything again [default: this machine,
    /// with its C library]
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
    /// Directory with programs that are already built for the target
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Write the image twice, compare both, and read it back
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(arguments: &Args) -> Result<()> {
    let target = Target::choose(arguments.target.as_deref())?;
    let binaries = match &arguments.binaries {
        Some(directory) => directory.clone(),
        None => binaries::build(&target)?,
    };
    let version = version()?;
    let reference = reference(arguments.tag.as_deref(), &version);
    let commit = Commit::read()?;

    let packages = packages::linked(&target)?;
    let sbom = sbom::document(
        &sbom::Subject {
            version: &version,
            revision: &commit.revision,
            architecture: target.architecture,
            created: commit.seconds,
            runtimes: &runtimes(&target)?,
        },
        &packages,
    );
    let sbom = format!("{sbom:#}\n");
    let files = files(&binaries, &target, &sbom, &packages::licenses(&packages)?)?;
    let layer = files.layer(commit.seconds)?;
    ensure!(
        layer.unpacked < LARGEST,
        "the files of the image have {} bytes, more than the limit of {LARGEST}",
        layer.unpacked
    );
    let description = Description {
        reference: reference.clone(),
        architecture: target.architecture,
        created: commit.seconds,
        entrypoint: vec!["/dataplane-agent".to_owned()],
        labels: labels(&version, &commit),
    };
    let (image, digest) = layout::archive(&description, &layer)?;
    if arguments.check {
        verify(&image, &description, &files, &target, commit.seconds)?;
    }

    let output = output(arguments.output.as_deref(), &version, target.architecture)?;
    let beside = output.with_extension("spdx.json");
    fs::write(&output, &image).with_context(|| format!("write {}", output.display()))?;
    fs::write(&beside, &sbom).with_context(|| format!("write {}", beside.display()))?;
    eprintln!(
        "{reference} ({}, {}): {} unpacked, {} as a file, {} packages, {digest}",
        target.architecture,
        target.triple,
        megabytes(layer.unpacked),
        megabytes(image.len() as u64),
        packages.len(),
    );
    println!("{}\n{}", output.display(), beside.display());
    Ok(())
}

/// All files of the image.
fn files(binaries: &Path, target: &Target, sbom: &str, others: &str) -> Result<Files> {
    let mut files = Files::default();
    for program in PROGRAMS {
        files.program(program, binaries::read(binaries, program, target)?);
    }
    // user, group and name service databases, which the C library reads
    files.text("etc/passwd", "root:x:0:0:root:/:/dataplane-agent\n");
    files.text("etc/group", "root:x:0:\n");
    files.text("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n");
    for license in ["LICENSE-APACHE", "LICENSE-MIT"] {
        let path = workspace::root().join(license);
        let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        files.text(&format!("usr/share/doc/dataplane/{license}"), text);
    }
    files.text("usr/share/doc/dataplane/LICENSES-OF-OTHERS", others);
    files.text(SBOM, sbom);
    Ok(files)
}

/// Libraries in the programs that are not packages of cargo: name, version, license.
fn runtimes(target: &Target) -> Result<Vec<(&'static str, String, &'static str)>> {
    let rust = process::output(Command::new("rustc").arg("--version"))?;
    let rust = rust.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut runtimes = vec![("rust-std", rust, "MIT OR Apache-2.0")];
    if target.is_glibc() {
        let glibc = process::output(Command::new("getconf").arg("GNU_LIBC_VERSION"))?;
        let glibc = glibc.trim().trim_start_matches("glibc ").to_owned();
        runtimes.push(("glibc", glibc, "LGPL-2.1-or-later"));
    } else {
        runtimes.push(("musl", "as shipped with rust-std".to_owned(), "MIT"));
    }
    Ok(runtimes)
}

fn labels(version: &str, commit: &Commit) -> Vec<(&'static str, String)> {
    vec![
        ("org.opencontainers.image.title", "dataplane".to_owned()),
        (
            "org.opencontainers.image.description",
            "Pod network and services of a Kubernetes node, in eBPF".to_owned(),
        ),
        ("org.opencontainers.image.version", version.to_owned()),
        ("org.opencontainers.image.revision", commit.revision.clone()),
        ("org.opencontainers.image.created", layout::timestamp(commit.seconds)),
        ("org.opencontainers.image.licenses", "MIT OR Apache-2.0".to_owned()),
        ("org.opencontainers.image.base.name", "scratch".to_owned()),
    ]
}

/// Fails unless the same files give the same image, and the image can be read back.
fn verify(
    image: &[u8],
    description: &Description,
    files: &Files,
    target: &Target,
    seconds: u64,
) -> Result<()> {
    let (again, _digest) = layout::archive(description, &files.layer(seconds)?)?;
    ensure!(again == image, "the same files gave a different image");
    let contents = check::read(image, &description.reference)?;
    for program in PROGRAMS {
        let content =
            contents.files.get(program).with_context(|| format!("{program} is not in the image"))?;
        binaries::check(content, target).with_context(|| program.to_owned())?;
    }
    let sbom = contents.files.get(SBOM).context("the image has no SBOM")?;
    let sbom: serde_json::Value = serde_json::from_slice(sbom)?;
    ensure!(sbom["spdxVersion"] == "SPDX-2.3", "the SBOM is not SPDX 2.3");
    for (label, value) in &description.labels {
        ensure!(contents.config["config"]["Labels"][label] == value.as_str(), "label {label} is missing");
    }
    eprintln!("check: OK (written twice, read back, {} files)", contents.files.len());
    Ok(())
}

/// The commit that the image is built from.
struct Commit {
    revision: String,
    /// `SOURCE_DATE_EPOCH`, or the time of the commit, in seconds after the epoch.
    seconds: u64,
}

impl Commit {
    fn read() -> Result<Self> {
        let git = |arguments: &[&str]| {
            process::output(Command::new("git").current_dir(workspace::root()).args(arguments))
        };
        let revision =
            git(&["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])?.trim().to_owned();
        let seconds = match env::var("SOURCE_DATE_EPOCH") {
            Ok(seconds) => seconds.parse().with_context(|| format!("SOURCE_DATE_EPOCH: {seconds:?}"))?,
            Err(_unset) => {
                git(&["log", "-1", "--format=%ct"])?.trim().parse().context("the commit's time")?
            }
        };
        Ok(Self { revision, seconds })
    }
}

fn version() -> Result<String> {
    let packages = workspace::metadata()?["packages"].as_array().context("cargo metadata: packages")?;
    let agent = packages.iter().find(|package| package["name"] == PROGRAMS[0]);
    let version = agent.and_then(|package| package["version"].as_str());
    version.map(str::to_owned).context("cargo metadata: the agent's version")
}

/// The image's name: a tag alone is a tag of [`NAME`].
fn reference(tag: Option<&str>, version: &str) -> String {
    match tag {
        Some(name) if name.contains(['/', ':']) => name.to_owned(),
        tag => format!("{NAME}:{}", tag.unwrap_or(version)),
    }
}

fn output(chosen: Option<&Path>, version: &str, architecture: &str) -> Result<PathBuf> {
    let path = chosen.map_or_else(
        || workspace::target_directory().map(|target| target.join("image")),
        |path| Ok(path.to_owned()),
    )?;
    let is_directory = chosen.is_none() || path.is_dir() || path.as_os_str().to_string_lossy().ends_with('/');
    let (directory, file) = if is_directory {
        (path.clone(), path.join(format!("dataplane-{version}-{architecture}.tar")))
    } else {
        (path.parent().unwrap_or(Path::new("")).to_owned(), path)
    };
    if !directory.as_os_str().is_empty() {
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    }
    Ok(file)
}

fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_alone_is_a_tag_of_the_default_name() {
        assert_eq!(reference(None, "0.1.0"), "dataplane.local/dataplane:0.1.0");
        assert_eq!(reference(Some("next"), "0.1.0"), "dataplane.local/dataplane:next");
        assert_eq!(
            reference(Some("registry:5000/net/dataplane:7"), "0.1.0"),
            "registry:5000/net/dataplane:7"
        );
    }

    #[test]
    fn file_in_a_directory_is_named_by_version_and_architecture() {
        let directory = tempfile::tempdir().unwrap();
        let named = directory.path().join("dataplane-0.1.0-arm64.tar");
        assert_eq!(output(Some(directory.path()), "0.1.0", "arm64").unwrap(), named);
        let file = directory.path().join("new/image.tar");
        assert_eq!(output(Some(&file), "0.1.0", "arm64").unwrap(), file);
        assert!(file.parent().unwrap().is_dir());
    }
}
