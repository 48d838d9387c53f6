//! The root file system of a guest: busybox, `ip`, kernel modules, and the programs to run with
//! their libraries.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::packages::Kernel;
use crate::process;

const INIT: &str = include_str!("init.sh");
/// Modules that are loaded first, except those that are built in.
const MODULES: [&str; 19] = [
    "veth",
    "vxlan",
    "bridge",
    "sch_ingress",
    "cls_bpf",
    "dummy",
    "sctp",
    "wireguard",
    "8021q",
    // IPsec
    "xfrm_user",
    "esp4",
    "esp6",
    "authenc",
    "cbc",
    "aes_generic",
    "sha256_generic",
    "echainiv",
    "sha512_generic",
    "drbg",
];
/// Programs that the tests start.
const TOOLS: [&str; 6] = ["ip", "tc", "nsenter", "ping", "bash", "wg"];

/// A program that a guest runs.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) name: String,
    pub(super) executable: PathBuf,
    pub(super) arguments: String,
    /// Time limit, after which it is killed.
    pub(super) seconds: u32,
}

/// Writes the image of `kernel` to `file`. `tree` is a directory to build it in, which is removed
/// first.
pub(super) fn write(
    kernel: &Kernel,
    steps: &[Step],
    companions: &[PathBuf],
    tree: &Path,
    file: &Path,
) -> Result<()> {
    let _absent = fs::remove_dir_all(tree);
    for directory in ["bin", "dev", "proc", "run", "sys", "t", "tmp", "var"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    symlink("../run", tree.join("var/run"))?;
    busybox(tree)?;
    for tool in TOOLS {
        let path = process::find(tool).with_context(|| format!("{tool} is not installed"))?;
        let target = tree.join("bin").join(tool);
        let _applet = fs::remove_file(&target);
        fs::copy(&path, &target).with_context(|| format!("copy {}", path.display()))?;
        libraries(&path, tree)?;
    }
    let mut lines = String::new();
    let mut programs = BTreeMap::new();
    for step in steps {
        let name = match programs.entry(&step.executable) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(program(&step.executable, tree)?),
        };
        lines += &format!("{} {} /t/{name} {}\n", step.seconds, step.name, step.arguments);
    }
    for companion in companions {
        program(companion, tree)?;
    }
    fs::write(tree.join("t/steps"), lines)?;
    modules(kernel, tree)?;
    fs::write(tree.join("init"), INIT)?;
    fs::set_permissions(tree.join("init"), Permissions::from_mode(0o755))?;
    pack(tree, file)
}

fn busybox(tree: &Path) -> Result<()> {
    let busybox = process::find("busybox").context("busybox is not installed")?;
    fs::copy(&busybox, tree.join("bin/busybox"))?;
    for applet in
        process::output(Command::new(&busybox).arg("--list"))?.lines().filter(|name| *name != "busybox")
    {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    Ok(())
}

/// Copies a program without debug information, and without cargo's hash in its name.
fn program(executable: &Path, tree: &Path) -> Result<String> {
    let file = executable.file_name().context("the program's path has no file name")?.to_string_lossy();
    let is_hash = |end: &str| end.len() == 16 && end.chars().all(|c| c.is_ascii_hexdigit());
    let name = file.rsplit_once('-').filter(|(_, end)| is_hash(end)).map_or(&*file, |(name, _)| name);
    let target = tree.join("t").join(name);
    let mut strip = Command::new("strip");
    process::output(strip.arg("-o").arg(&target).arg(executable))?;
    libraries(executable, tree)?;
    Ok(name.to_owned())
}

/// Copies the libraries of a program to the same paths.
fn libraries(program: &Path, tree: &Path) -> Result<()> {
    let text = process::output(Command::new("ldd").arg(program))?;
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        let target = tree.join(library.trim_start_matches('/'));
        if target.exists() {
            continue;
        }
        fs::create_dir_all(target.parent().context("the library's path has no directory")?)?;
        fs::copy(library, &target).with_context(|| format!("copy {library}"))?;
    }
    Ok(())
}

/// Copies the modules, decompressed, and lists them in load order.
fn modules(kernel: &Kernel, tree: &Path) -> Result<()> {
    let dependencies = dependencies(&kernel.modules)?;
    let mut order = String::new();
    let mut copied = BTreeSet::new();
    for name in MODULES {
        // a module that is not listed is built in; if it is not, a test that needs it fails
        let Some(line) = dependencies.lines().find(|line| is_module(line, name)) else { continue };
        // a line has the module before its dependencies
        for path in line.split([':', ' ']).filter(|path| !path.is_empty()).rev() {
            let file =
                Path::new(path).file_name().context("the module's path has no file name")?.to_string_lossy();
            let target = Path::new("t").join(file.trim_end_matches(".xz"));
            if copied.insert(target.clone()) {
                let source = kernel.modules.join(path);
                let text = if file.ends_with(".xz") { decompress(&source)? } else { fs::read(&source)? };
                fs::write(tree.join(&target), text)?;
                order += &format!("/{}\n", target.display());
            }
        }
    }
    Ok(fs::write(tree.join("t/modules"), order)?)
}

/// Whether a line of modules.dep is for this module.
fn is_module(line: &str, name: &str) -> bool {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split('.').next().is_some_and(|module| module.replace('-', "_") == name)
}

/// The content of `modules.dep`, which packages do not contain: depmod writes it.
fn dependencies(modules: &Path) -> Result<String> {
    let file = modules.join("modules.dep");
    if !file.is_file() {
        let (Some(release), Some(root)) = (modules.file_name(), modules.ancestors().nth(3)) else {
            bail!("{} is not a module directory", modules.display());
        };
        process::output(Command::new("busybox").args(["depmod", "-b"]).arg(root).arg(release))?;
    }
    fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
}

fn decompress(path: &Path) -> Result<Vec<u8>> {
    let output = Command::new("xz").arg("-dc").arg(path).output().context("run xz (package xz-utils)")?;
    if !output.status.success() {
        bail!("xz {}: {}", path.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// Writes the tree as a cpio archive, the format of an initramfs.
fn pack(tree: &Path, file: &Path) -> Result<()> {
    let mut cpio = Command::new("cpio");
    cpio.current_dir(tree).args(["--create", "--format=newc", "--null", "--quiet", "--owner=0:0"]);
    let mut child = cpio
        .stdin(Stdio::piped())
        .stdout(File::create(file).with_context(|| format!("write {}", file.display()))?)
        .spawn()
        .context("run cpio")?;
    let mut list = Vec::new();
    walk(tree, Path::new(""), &mut list)?;
    child.stdin.take().context("cpio has no stdin")?.write_all(&list)?;
    if !child.wait()?.success() {
        bail!("cpio failed in {}", tree.display());
    }
    Ok(())
}

/// Paths below `tree`, directories before their content, each terminated by a zero byte.
fn walk(tree: &Path, below: &Path, list: &mut Vec<u8>) -> Result<()> {
    for entry in fs::read_dir(tree.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        list.extend_from_slice(path.as_os_str().as_encoded_bytes());
        list.push(0);
        if entry.file_type()?.is_dir() {
            walk(tree, &path, list)?;
        }
    }
    Ok(())
}
