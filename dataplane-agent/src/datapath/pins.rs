//! Paths of the pinned maps, programs and links, which outlive the agent:
//! `<bpffs>/dataplane/v<ABI>/{maps,programs,links}/`.
//!
//! Owns the paths and the mount of the BPF file system. Does not open pinned objects.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use dataplane_common::{ABI_VERSION, abi::names::program};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Why the pin directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    #[error(
        "{path} is not a BPF file system, and not an empty directory to mount one on; set `bpffs` to another path"
    )]
    Occupied { path: PathBuf },
    #[error("mount a BPF file system on {path}: {source}")]
    Mount { path: PathBuf, source: nix::Error },
    #[error("unmount the BPF file system on {path}: {source}")]
    Unmount { path: PathBuf, source: nix::Error },
    #[error("{operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
}

/// The pin directory of this ABI version.
#[derive(Clone, Debug)]
pub struct Pins {
    bpffs: PathBuf,
    root: PathBuf,
}

/// Directory of all ABI versions, in the BPF file system.
const DIRECTORY: &str = "dataplane";
/// Marker in [`DIRECTORY`]: an agent mounted the BPF file system, so `cleanup` unmounts it.
const MOUNT_MARKER: &str = "mounted";
/// Directory of a set of programs that is not complete yet.
const NEXT_PROGRAM_SET: &str = "next";

impl Pins {
    /// The paths below `bpffs`. Does no I/O.
    pub fn new(bpffs: &Path) -> Self {
        let root = bpffs.join(DIRECTORY).join(format!("v{ABI_VERSION}"));
        Self { bpffs: bpffs.to_owned(), root }
    }

    /// Creates the directories. Mounts a BPF file system first if there is none.
    pub fn prepare(&self) -> Result<(), PinsError> {
        create(&self.bpffs)?;
        let mounted = self.ensure_bpffs()?;
        create(&self.root.join("maps"))?;
        create(&self.root.join("programs"))?;
        create(&self.root.join("links"))?;
        if mounted {
            create(&self.bpffs.join(DIRECTORY).join(MOUNT_MARKER))?;
        }
        Ok(())
    }

    fn ensure_bpffs(&self) -> Result<bool, PinsError> {
        let path = &self.bpffs;
        if is_bpffs(path)? {
            return Ok(false);
        }
        if read_dir(path)?.next().is_some() {
            return Err(PinsError::Occupied { path: path.clone() });
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpffs"), path, Some("bpf"), flags, Some("mode=0700"))
            .map_err(|source| PinsError::Mount { path: path.clone(), source })?;
        Ok(true)
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    /// Pin of a map of another ABI version.
    pub fn map_of_version(&self, version: u32, name: &str) -> PathBuf {
        self.bpffs.join(DIRECTORY).join(format!("v{version}")).join("maps").join(name)
    }

    /// Directory of the programs with this fingerprint. It has all of them, or does not exist.
    pub fn program_set(&self, fingerprint: u64) -> PathBuf {
        self.programs().join(format!("{fingerprint:016x}"))
    }

    /// Creates an empty directory for a new set of programs.
    pub fn create_program_set(&self) -> Result<PathBuf, PinsError> {
        let path = self.programs().join(NEXT_PROGRAM_SET);
        // an agent that was stopped while it pinned programs left it
        remove_tree_if_exists(&path)?;
        create(&path)?;
        Ok(path)
    }

    /// Gives the set of [`Self::create_program_set`] its name, in place of a set with this name.
    pub fn publish_program_set(&self, fingerprint: u64) -> Result<(), PinsError> {
        let path = self.programs().join(NEXT_PROGRAM_SET);
        let set = self.program_set(fingerprint);
        remove_tree_if_exists(&set)?;
        fs::rename(&path, set).map_err(|source| PinsError::Io { operation: "rename", path, source })
    }

    /// Removes all sets of programs but this one. Programs of the others that are attached stay
    /// attached.
    pub fn remove_other_program_sets(&self, fingerprint: u64) -> Result<(), PinsError> {
        let kept = self.program_set(fingerprint);
        for name in names(&self.programs())? {
            let path = self.programs().join(name);
            if path != kept {
                remove_tree(&path)?;
            }
        }
        Ok(())
    }

    /// Pin of a program's link on a device.
    pub fn device_link(&self, program: &str, device: &str) -> PathBuf {
        // bpffs refuses names with dots (kernel/bpf/inode.c, bpf_lookup); device names may have
        // dots but no colons
        self.links().join(format!("{program}_{}", device.replace('.', ":")))
    }

    /// Pin of a program's link on the cgroup.
    pub fn socket_link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// Pin of a new link on the cgroup, until it replaces the pin in use.
    pub fn next_socket_link(&self, program: &str) -> PathBuf {
        self.links().join(format!("next_{program}"))
    }

    /// Devices with a pinned link of `program`.
    pub fn devices(&self, program: &str) -> Result<BTreeSet<String>, PinsError> {
        let mut devices = BTreeSet::new();
        for name in names(&self.links())? {
            if let Some(device) = name.strip_prefix(program).and_then(|rest| rest.strip_prefix('_')) {
                devices.insert(device.replace(':', "."));
            }
        }
        Ok(devices)
    }

    /// Devices with any pinned link.
    pub fn all_devices(&self) -> Result<BTreeSet<String>, PinsError> {
        let mut devices = BTreeSet::new();
        for program in program::DEVICE {
            devices.append(&mut self.devices(program)?);
        }
        Ok(devices)
    }

    /// The pinned links of all ABI versions.
    pub fn all_links(&self) -> Result<Vec<PathBuf>, PinsError> {
        let directory = self.bpffs.join(DIRECTORY);
        let mut links = Vec::new();
        for version in names(&directory)? {
            let of_version = directory.join(version).join("links");
            links.extend(names(&of_version)?.into_iter().map(|name| of_version.join(name)));
        }
        Ok(links)
    }

    /// Removes a pin. Returns false if it does not exist. The kernel detaches a link without other
    /// references.
    pub fn remove(path: &Path) -> Result<bool, PinsError> {
        match fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(PinsError::Io { operation: "remove", path: path.to_owned(), source }),
        }
    }

    /// Renames the pin of a program's link on a device that was renamed. A missing pin is not an
    /// error.
    pub fn rename_device(&self, program: &str, from: &str, to: &str) -> Result<(), PinsError> {
        let path = self.device_link(program, from);
        match fs::rename(&path, self.device_link(program, to)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.map_err(|source| PinsError::Io { operation: "rename", path, source }),
        }
    }

    /// Removes the pins of other ABI versions, which detaches their programs. Call it after this
    /// version is attached.
    pub fn remove_other_versions(&self) -> Result<Vec<PathBuf>, PinsError> {
        let directory = self.bpffs.join(DIRECTORY);
        let mut removed = Vec::new();
        for name in names(&directory)? {
            let path = directory.join(&name);
            if path == self.root || name == MOUNT_MARKER {
                continue;
            }
            remove_tree(&path)?;
            removed.push(path);
        }
        Ok(removed)
    }

    /// Removes the pins of all ABI versions, and the mount if an agent mounted it. Returns the
    /// removed paths.
    pub fn remove_all(&self) -> Result<Vec<PathBuf>, PinsError> {
        let directory = self.bpffs.join(DIRECTORY);
        if !directory.exists() || !is_bpffs(&self.bpffs)? {
            return Ok(Vec::new());
        }
        let mounted_by_agent = directory.join(MOUNT_MARKER).exists();
        remove_tree(&directory)?;
        let mut removed = vec![directory];
        // only the kernel's own files, such as `maps.debug`, have names with dots
        if mounted_by_agent && names(&self.bpffs)?.iter().all(|name| name.contains('.')) {
            umount2(&self.bpffs, MntFlags::MNT_DETACH)
                .map_err(|source| PinsError::Unmount { path: self.bpffs.clone(), source })?;
            removed.push(self.bpffs.clone());
        }
        Ok(removed)
    }

    fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }

    fn links(&self) -> PathBuf {
        self.root.join("links")
    }
}

fn is_bpffs(path: &Path) -> Result<bool, PinsError> {
    let stat = statfs(path).map_err(|errno| PinsError::Io {
        operation: "statfs",
        path: path.to_owned(),
        source: errno.into(),
    })?;
    Ok(stat.filesystem_type() == BPF_FS_MAGIC)
}

fn create(path: &Path) -> Result<(), PinsError> {
    fs::create_dir_all(path).map_err(|source| PinsError::Io {
        operation: "create",
        path: path.to_owned(),
        source,
    })
}

fn read_dir(path: &Path) -> Result<fs::ReadDir, PinsError> {
    fs::read_dir(path).map_err(|source| PinsError::Io { operation: "read", path: path.to_owned(), source })
}

/// Names in a directory; none if it does not exist.
fn names(path: &Path) -> Result<Vec<String>, PinsError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in read_dir(path)? {
        let entry =
            entry.map_err(|source| PinsError::Io { operation: "read", path: path.to_owned(), source })?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}

fn remove_tree(path: &Path) -> Result<(), PinsError> {
    fs::remove_dir_all(path).map_err(|source| PinsError::Io {
        operation: "remove",
        path: path.to_owned(),
        source,
    })
}

fn remove_tree_if_exists(path: &Path) -> Result<(), PinsError> {
    if path.exists() { remove_tree(path) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pin_of_a_device_with_a_dot_has_no_dot() {
        let pins = Pins::new(Path::new("/sys/fs/bpf"));
        let link = pins.device_link("from_wire", "eth0.100");
        assert!(!link.file_name().unwrap().to_str().unwrap().contains('.'));
    }

    #[test]
    fn devices_are_listed_by_program() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::new(directory.path());
        fs::create_dir_all(pins.links()).unwrap();
        for link in [
            pins.device_link("from_wire", "eth0.100"),
            pins.device_link("to_wire", "eth0.100"),
            pins.device_link("from_pod", "dp1234567890a"),
            pins.socket_link("connect4"),
        ] {
            fs::write(link, "").unwrap();
        }
        assert_eq!(pins.devices("from_wire").unwrap(), BTreeSet::from(["eth0.100".to_owned()]));
        assert_eq!(
            pins.all_devices().unwrap(),
            BTreeSet::from(["dp1234567890a".to_owned(), "eth0.100".to_owned()])
        );
    }

    #[test]
    fn bpffs_is_not_mounted_over_a_directory_with_files() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("precious"), "").unwrap();
        let error = Pins::new(directory.path()).prepare().unwrap_err();
        assert!(matches!(error, PinsError::Occupied { .. }), "{error}");
    }
}
