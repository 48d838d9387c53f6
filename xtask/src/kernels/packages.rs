//! Debian's cloud kernels, as packages that are downloaded and unpacked, not installed.
//!
//! apt uses its own directory and sources, and does not change the machine's package lists, cache
//! and sources.

use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context as _, Result, bail};

use crate::process;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const SUITES: [(&str, &str); 4] = [
    ("debian-security", "bullseye-security"),
    ("debian-security", "bookworm-security"),
    ("debian-security", "trixie-security"),
    ("debian", "trixie-backports"),
];
/// In place of a version: the highest one.
pub(super) const NEWEST: &str = "newest";

/// An unpacked kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Name from the command line: `6.12`, `newest`.
    pub(super) name: String,
    pub(super) image: PathBuf,
    /// Directory of its modules: `…/lib/modules/<release>`.
    pub(super) modules: PathBuf,
}

/// The kernel of this name: the one that was downloaded before, or the highest release of that
/// version.
pub(super) fn kernel(directory: &Path, name: &str, update: bool) -> Result<Kernel> {
    let root = directory.join(name).join("root");
    if update && root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))?;
    }
    if !root.exists() {
        let apt = Apt { directory: directory.join("apt") };
        let packages = choose(apt.packages()?, name).with_context(|| {
            format!("no cloud kernel {name} in {}", SUITES.map(|(_, suite)| suite).join(", "))
        })?;
        // renamed when it is complete
        let partial = directory.join(name).join("partial");
        let _absent = fs::remove_dir_all(&partial);
        fs::create_dir_all(&partial).with_context(|| format!("create {}", partial.display()))?;
        for package in packages {
            apt.unpack(&package, &partial)?;
        }
        fs::rename(&partial, &root).with_context(|| format!("create {}", root.display()))?;
    }
    let order =
        find(&root, &|file| file == "modules.order").context("the packages contain no modules.order")?;
    Ok(Kernel {
        name: name.to_owned(),
        image: find(&root, &|file| file.starts_with("vmlinuz")).context("the packages contain no vmlinuz")?,
        modules: order.parent().context("the path of modules.order has no directory")?.to_owned(),
    })
}

/// The first file whose name matches.
fn find(directory: &Path, fits: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let mut directories = Vec::new();
    for entry in fs::read_dir(directory).ok()?.flatten() {
        if entry.file_type().ok()?.is_dir() {
            directories.push(entry.path());
        } else if fits(&entry.file_name().to_string_lossy()) {
            return Some(entry.path());
        }
    }
    directories.iter().find_map(|directory| find(directory, fits))
}

struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// Names of all packages with a cloud kernel or a part of one. Read once per run.
    fn packages(&self) -> Result<&'static [String]> {
        static PACKAGES: OnceLock<Vec<String>> = OnceLock::new();
        if let Some(packages) = PACKAGES.get() {
            return Ok(packages);
        }
        self.prepare()?;
        process::run(self.command("apt-get").args(["--quiet", "update"]))
            .context("read Debian's package lists")?;
        let pattern = "^linux-(image|binary|binary-unsigned|modules)-[0-9].*-cloud-amd64$";
        let text = process::output(self.command("apt-cache").args(["search", "--names-only", pattern]))?;
        let names = text.lines().filter_map(|line| line.split(' ').next());
        Ok(PACKAGES.get_or_init(|| names.map(str::to_owned).collect()))
    }

    fn prepare(&self) -> Result<()> {
        if !Path::new(KEYRING).is_file() {
            bail!("{KEYRING} does not exist: install the package debian-archive-keyring");
        }
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(self.directory.join(part))?;
        }
        let sources = SUITES.map(|(archive, suite)| {
            format!("deb [arch=amd64 signed-by={KEYRING}] http://deb.debian.org/{archive} {suite} main\n")
        });
        fs::write(self.directory.join("sources.list"), sources.concat())?;
        let here = self.directory.display();
        let settings = format!(
            "Dir::Etc::sourcelist \"{here}/sources.list\";\nDir::Etc::sourceparts \"-\";\n\
             Dir::Etc::preferencesparts \"-\";\nDir::State::Lists \"{here}/lists\";\nDir::Cache \"{here}/cache\";\n\
             Acquire::Languages \"none\";\nAPT::Architecture \"amd64\";\nAPT::Sandbox::User \"root\";\n"
        );
        Ok(fs::write(self.directory.join("apt.conf"), settings)?)
    }

    fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let fetched = into.with_file_name("fetched");
        fs::create_dir_all(&fetched)?;
        process::run(
            self.command("apt-get").current_dir(&fetched).args(["--quiet", "download"]).arg(package),
        )?;
        let archive = find(&fetched, &|file| file.starts_with(&format!("{package}_")))
            .with_context(|| format!("apt-get download wrote no file for {package}"))?;
        process::run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(into))?;
        fs::remove_dir_all(&fetched).with_context(|| format!("remove {}", fetched.display()))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.directory.join("apt.conf"));
        command
    }
}

/// The packages of the highest release of that version.
fn choose(packages: &[String], name: &str) -> Option<Vec<String>> {
    let mut versions: Vec<(&str, Vec<String>)> =
        packages.iter().filter_map(|package| complete(packages, package)).collect();
    versions.retain(|(version, _)| {
        let rest = version.strip_prefix(name);
        name == NEWEST || rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    });
    versions.into_iter().max_by(|(a, _), (b, _)| compare(a, b)).map(|(_, packages)| packages)
}

/// The version of a kernel package, and all packages of that kernel. Until 6.18 one package has
/// everything. From 6.19 on the image package is empty, and archives keep the kernels of some
/// versions without their modules.
fn complete<'a>(packages: &[String], package: &'a str) -> Option<(&'a str, Vec<String>)> {
    let split =
        ["linux-binary-unsigned-", "linux-binary-"].iter().find_map(|kind| package.strip_prefix(kind));
    let version = split.or_else(|| package.strip_prefix("linux-image-"))?;
    let number = version.strip_suffix("-cloud-amd64")?;
    // "6.12-cloud-amd64" is a metapackage
    if number.matches('.').count() < 2 {
        return None;
    }
    let modules = format!("linux-modules-{version}");
    match split {
        Some(_) if packages.contains(&modules) => {
            Some((number, vec![package.to_owned(), modules, format!("linux-base-{version}")]))
        }
        None if compare(number, "6.19") == Ordering::Less => Some((number, vec![package.to_owned()])),
        _ => None,
    }
}

/// Sort key of a version: its numbers.
fn compare(a: &str, b: &str) -> Ordering {
    fn numbers(version: &str) -> impl Iterator<Item = u32> {
        version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok())
    }
    numbers(a).cmp(numbers(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packages() -> Vec<String> {
        let names = [
            "linux-image-5.10.0-9",
            "linux-image-5.10.0-46",
            "linux-image-6.1-",
            "linux-image-6.1.0-56",
            "linux-image-6.12.117+deb13",
            "linux-image-7.2.12+deb13",
            "linux-binary-7.1.8+deb13",
            "linux-binary-7.2.12+deb13",
            "linux-modules-7.2.12+deb13",
        ];
        names.map(|name| format!("{}-cloud-amd64", name.trim_end_matches('-'))).to_vec()
    }

    #[test]
    fn highest_release_of_a_version_is_chosen() {
        let one = |name| choose(&packages(), name).map(|packages| packages[0].clone());
        assert_eq!(one("5.10").unwrap(), "linux-image-5.10.0-46-cloud-amd64");
        assert_eq!(one("6.1").unwrap(), "linux-image-6.1.0-56-cloud-amd64", "6.12 is no 6.1");
        assert_eq!(one("6.12").unwrap(), "linux-image-6.12.117+deb13-cloud-amd64");
        assert_eq!(one("4.19"), None);
    }

    #[test]
    fn split_kernel_needs_all_its_packages() {
        let newest = choose(&packages(), NEWEST).unwrap();
        let version = "7.2.12+deb13-cloud-amd64";
        assert_eq!(newest, ["binary", "modules", "base"].map(|part| format!("linux-{part}-{version}")));
        assert_eq!(choose(&packages(), "7.1"), None, "its modules are gone");
    }
}
