//! Attaches the socket programs to a cgroup, whose sockets are translated at `connect()`.
//!
//! The links are pinned and outlive the agent. aya cannot replace the program of a cgroup link, so
//! a new link is attached and replaces the old one's pin by `rename`, which detaches the old link.
//! In between both programs run. The second finds an address that is already translated, so every
//! connection is translated exactly once.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use aya::{
    pin::PinError,
    programs::{
        CgroupAttachMode, Program, ProgramError,
        links::{FdLink, LinkError},
    },
};
use dataplane_common::abi::names::program;

use super::{
    loader::Datapath,
    pins::PinsError,
    tc::{open_link, unpin},
};

/// Why the socket programs could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("open cgroup {path}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("attach {program} to cgroup {path}: {source}")]
    Attach { program: &'static str, path: PathBuf, source: ProgramError },
    #[error("get the cgroup link of {program}: {source}")]
    Link { program: &'static str, source: LinkError },
    #[error("pin the cgroup link of {program}: {source}")]
    Pin { program: &'static str, source: PinError },
    #[error("replace the pinned cgroup link of {program}: {source}")]
    Replace { program: &'static str, source: io::Error },
    #[error("read /proc/self/mountinfo: {0}")]
    Mounts(#[source] io::Error),
    #[error("no cgroup2 file system is mounted: mount one, or set `cgroup` in the configuration to its path")]
    NoCgroup2,
    #[error(transparent)]
    Pins(#[from] PinsError),
}

/// Links always allow multiple programs on a cgroup. `BPF_F_ALLOW_MULTI` is for attachments without
/// a link; the kernel refuses a link with flags (kernel/bpf/cgroup.c, `cgroup_bpf_link_attach`).
const LINK_MODE: CgroupAttachMode = CgroupAttachMode::Single;

impl Datapath {
    /// Attaches the socket programs to a cgroup and its descendants, replacing those of an earlier
    /// agent.
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<(), CgroupError> {
        let directory =
            File::open(cgroup).map_err(|source| CgroupError::Open { path: cgroup.to_owned(), source })?;
        for name in program::SOCKET {
            self.attach_socket_program(name, cgroup, &directory)?;
        }
        Ok(())
    }

    /// Detaches the programs from the cgroup. Existing connections keep their backend.
    pub fn detach_cgroup(&mut self) -> Result<(), CgroupError> {
        for name in program::SOCKET {
            unpin(&self.pins.next_socket_link(name))?;
            unpin(&self.pins.socket_link(name))?;
        }
        Ok(())
    }

    fn attach_socket_program(
        &mut self,
        name: &'static str,
        cgroup: &Path,
        directory: &File,
    ) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::Attach { program: name, path: cgroup.to_owned(), source };
        let link = match self.programs.get_mut(name) {
            Some(Program::CgroupSockAddr(program)) => {
                let id = program.attach(directory, LINK_MODE).map_err(failed)?;
                FdLink::try_from(program.take_link(id).map_err(failed)?)
            }
            Some(Program::CgroupSock(program)) => {
                let id = program.attach(directory, LINK_MODE).map_err(failed)?;
                FdLink::try_from(program.take_link(id).map_err(failed)?)
            }
            Some(_) => return Err(failed(ProgramError::UnexpectedProgramType)),
            None => return Err(failed(ProgramError::NotLoaded)),
        };
        let link = link.map_err(|source| CgroupError::Link { program: name, source })?;
        let next = self.pins.next_socket_link(name);
        let pin = self.pins.socket_link(name);
        // left by an agent that crashed between the two steps below
        unpin(&next)?;
        link.pin(&next).map(drop).map_err(|source| CgroupError::Pin { program: name, source })?;
        // detaches the old link at the end of this function: see `open_link`
        let _old_link = open_link(&pin);
        if let Err(source) = fs::rename(&next, pin) {
            unpin(&next)?;
            return Err(CgroupError::Replace { program: name, source });
        }
        Ok(())
    }
}

/// Mount point of the cgroup2 hierarchy; of several mounts, the one whose root is highest in the
/// hierarchy. In a container this is the host's mount, if there is one, and not the container's
/// own.
pub fn default_cgroup() -> Result<PathBuf, CgroupError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::Mounts)?;
    cgroup2_mount(&mounts).ok_or(CgroupError::NoCgroup2)
}

/// Parses proc(5): `36 35 98:0 /root /mount/point options - type source options`, with spaces
/// encoded as `\040`.
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let is_cgroup2 = filesystem.split(' ').next() == Some("cgroup2");
        let mut fields = mount.split(' ').skip(3);
        let (root, path) = (fields.next()?, fields.next()?);
        is_cgroup2.then(|| (depth(root), PathBuf::from(path.replace("\\040", " "))))
    });
    // of equal depths the first
    mounts.min_by_key(|(depth, _)| *depth).map(|(_, path)| path)
}

/// Depth of a mount's root below the root of the cgroup namespace; negative above it
/// (`cgroup_namespaces(7)`: `/../..`).
fn depth(root: &str) -> i32 {
    root.split('/').filter(|part| !part.is_empty()).map(|part| if part == ".." { -1 } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_mount_is_found() {
        let mounts = "\
            29 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n\
            30 29 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate\n\
            31 29 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
        assert_eq!(cgroup2_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_mount(""), None);
    }

    #[test]
    fn in_a_container_the_mount_of_the_host_is_preferred() {
        let own = "90 80 0:27 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n";
        let host = "91 80 0:27 /../../.. /host/sys/fs/cgroup rw master:9 - cgroup2 cgroup2 rw\n";
        // a container in the host's cgroup namespace
        let shared = "90 80 0:27 /kubepods/pod1/c1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
                      91 80 0:27 / /host/sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(&format!("{own}{host}")), Some(PathBuf::from("/host/sys/fs/cgroup")));
        assert_eq!(cgroup2_mount(&format!("{host}{own}")), Some(PathBuf::from("/host/sys/fs/cgroup")));
        assert_eq!(cgroup2_mount(shared), Some(PathBuf::from("/host/sys/fs/cgroup/unified")));
    }
}
