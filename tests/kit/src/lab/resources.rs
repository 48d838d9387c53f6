//! The resources of a cluster on the machine, and their removal: by the owner, on a signal, or by a
//! later run.
//!
//! All of them carry the cluster's name: `/run/dataplane-lab/<cluster>/`, namespaces
//! `dpl-<cluster>-*`, the cgroup `dataplane-lab/<cluster>`. The owner holds a lock file: a cluster
//! whose lock is free and that is not marked as kept has lost its owner.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{interrupt, netns::Namespace, wait};

const ROOT: &str = "/run/dataplane-lab";
const CGROUP: &str = "dataplane-lab";
/// Marks a cluster directory as kept: it stays after its owner has ended.
const KEPT: &str = "kept";

/// Names of the clusters of this process.
static OWNED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Held during removal of clusters of this process. After a signal it is held until the process
/// ends, and owners wait for it.
static REMOVAL: Mutex<()> = Mutex::new(());

/// A claimed cluster name and its resources.
#[derive(Debug)]
pub(super) struct Resources {
    name: String,
    is_kept: bool,
    _lock: Flock<File>,
}

impl Resources {
    /// Claims the name, after removing what crashed programs left behind.
    pub(super) fn claim(name: &str) -> Result<Self> {
        interrupt::install()?;
        remove_orphans()?;
        // another process that looks for leftovers may hold the lock for a moment
        let claimed = wait::until("its lock", Duration::from_secs(2), || lock(name));
        let lock = claimed.with_context(|| format!("cluster {name} is in use"))?;
        if directory(name).exists() {
            bail!("cluster {name} was kept: take it down first");
        }
        OWNED.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        let resources = Self { name: name.to_owned(), is_kept: false, _lock: lock };
        fs::create_dir_all(resources.directory())?;
        fs::create_dir_all(resources.cgroup()?)?;
        Ok(resources)
    }

    pub(super) fn directory(&self) -> PathBuf {
        directory(&self.name)
    }

    pub(super) fn cgroup(&self) -> Result<PathBuf> {
        Ok(cgroup_root()?.join(&self.name))
    }

    /// Name of a namespace of the cluster.
    pub(super) fn namespace(&self, what: &str) -> String {
        format!("{}{what}", prefix(&self.name))
    }

    /// Marks the cluster as kept: dropping the owner removes nothing.
    pub(super) fn keep(&mut self) -> Result<()> {
        fs::write(self.directory().join(KEPT), "")?;
        self.is_kept = true;
        Ok(())
    }
}

impl Drop for Resources {
    fn drop(&mut self) {
        let _guard = REMOVAL.lock().unwrap_or_else(PoisonError::into_inner);
        OWNED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
        if self.is_kept {
            return;
        }
        if let Err(error) = remove(&self.name) {
            tracing::warn!(cluster = self.name, "cannot remove cluster completely: {error:#}");
        }
    }
}

/// Mounts a new BPF file system at `path`.
pub(super) fn mount_bpffs(path: &Path) -> Result<()> {
    fs::create_dir_all(path)?;
    mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .with_context(|| format!("mount a bpf file system at {}", path.display()))
}

/// Removes a kept cluster; returns whether there was one.
pub fn take_down(name: &str) -> Result<bool> {
    if !directory(name).exists() {
        return Ok(false);
    }
    let Some(_lock) = lock(name)? else { bail!("cluster {name} is in use by a running program") };
    remove(name)?;
    Ok(true)
}

/// Removes the clusters of this process, which is about to end. The caller ends it while it holds
/// the returned lock.
pub(super) fn remove_owned() -> MutexGuard<'static, ()> {
    let guard = REMOVAL.lock().unwrap_or_else(PoisonError::into_inner);
    let owned = OWNED.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for name in owned {
        if let Err(error) = remove(&name) {
            eprintln!("cannot remove cluster {name} completely: {error:#}");
        }
    }
    guard
}

/// Removes clusters whose owners ended without removing them.
fn remove_orphans() -> Result<()> {
    fs::create_dir_all(ROOT)?;
    for entry in fs::read_dir(ROOT)? {
        let file = entry?.file_name();
        let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".lock")) else { continue };
        if directory(name).join(KEPT).exists() {
            continue;
        }
        if let Some(_lock) = lock(name)? {
            remove(name).with_context(|| format!("remove the leftover cluster {name}"))?;
        }
    }
    Ok(())
}

/// Takes the lock of a cluster; `None`: another process holds it.
fn lock(name: &str) -> Result<Option<Flock<File>>> {
    let path = lock_file(name);
    loop {
        let file = OpenOptions::new().create(true).append(true).open(&path).context("open a lock")?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // the lock file was deleted by the process that removed the cluster: try the new one
            Ok(lock) if lock.metadata()?.nlink() == 0 => {}
            Ok(lock) => return Ok(Some(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
    }
}

/// Removes a cluster. The caller holds its lock.
fn remove(name: &str) -> Result<()> {
    let cgroup = cgroup_root()?.join(name);
    remove_cgroup(&cgroup)?;
    for namespace in Namespace::all_named(&prefix(name))? {
        Namespace::delete(&namespace)?;
    }
    let directory = directory(name);
    for mount in mounts_below(&directory)? {
        umount2(&mount, MntFlags::MNT_DETACH).with_context(|| format!("unmount {}", mount.display()))?;
    }
    ignore_not_found(fs::remove_dir_all(&directory)).with_context(|| directory.display().to_string())?;
    ignore_not_found(fs::remove_file(lock_file(name))).context("remove a lock")
}

/// Kills the processes of a cgroup, and removes it with all its descendants.
fn remove_cgroup(cgroup: &Path) -> Result<()> {
    wait::until("removal of a cluster's cgroup", Duration::from_secs(10), || {
        let groups = cgroups_below(cgroup)?;
        for group in &groups {
            for pid in fs::read_to_string(group.join("cgroup.procs"))?.lines() {
                let _may_have_ended = kill(Pid::from_raw(pid.parse()?), Signal::SIGKILL);
            }
        }
        // busy while a killed process is exiting, or a new one is starting
        for group in groups.iter().rev() {
            ignore_not_found(fs::remove_dir(group)).with_context(|| group.display().to_string())?;
        }
        Ok(Some(()))
    })
}

/// A cgroup and its descendants, parents first; empty if it does not exist.
fn cgroups_below(cgroup: &Path) -> Result<Vec<PathBuf>> {
    if !cgroup.exists() {
        return Ok(Vec::new());
    }
    let mut found = vec![cgroup.to_owned()];
    let mut next = 0;
    while let Some(group) = found.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(&group)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    Ok(points.filter(|point| point.starts_with(directory)).collect())
}

fn cgroup_root() -> Result<PathBuf> {
    Ok(dataplane_agent::datapath::default_cgroup()?.join(CGROUP))
}

fn directory(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

fn lock_file(name: &str) -> PathBuf {
    Path::new(ROOT).join(format!("{name}.lock"))
}

fn prefix(name: &str) -> String {
    format!("dpl-{name}-")
}

fn ignore_not_found(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
