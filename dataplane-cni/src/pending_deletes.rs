//! DeletionQueue about pods that went while no agent ran: DEL leaves one beside the agent's socket, the next agent takes it.
//!
//! A runtime that may not remove a pod cannot drain a node whose agent is broken, so DEL does not wait for one. A note
//! is an empty file whose name says all there is to say: it is there or it is not, never half of it.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use crate::protocol::Attachment;

/// Name of the directory of notes.
const DIRECTORY: &str = "gone";
/// Between container and device: no container ID has one.
const AT: char = '@';

/// A note that cannot be left, read or taken.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}: {source}")]
pub struct DeletionQueueError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The directory of notes. It exists once there was one.
#[derive(Clone, Debug)]
pub struct DeletionQueue {
    directory: PathBuf,
}

/// What is in the directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub gone: Vec<Attachment>,
    /// Files that are no notes.
    pub strangers: Vec<PathBuf>,
}

impl DeletionQueue {
    /// Those for the agent of a run directory.
    pub fn of(run_dir: &Path) -> Self {
        Self { directory: run_dir.join(DIRECTORY) }
    }

    /// Those for the agent that listens, or would listen, on a socket.
    pub fn beside(socket: &Path) -> Self {
        Self { directory: socket.with_file_name(DIRECTORY) }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Leaves a note. The run directory is not made: where there is none, no agent will look.
    pub fn leave(&self, gone: &Attachment) -> Result<(), DeletionQueueError> {
        match DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("create", &self.directory)(error));
            }
            _ => {}
        }
        let path = self.path(gone);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.open(&path).map(drop).map_err(failed("create", &path))
    }

    /// Takes a note away. One that is not there is no error.
    pub fn remove(&self, gone: &Attachment) -> Result<(), DeletionQueueError> {
        let path = self.path(gone);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Every note there is.
    pub fn read(&self) -> Result<Found, DeletionQueueError> {
        let failed = || failed("read", &self.directory);
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::default()),
            entries => entries.map_err(failed())?,
        };
        let mut found = Found::default();
        for entry in entries {
            let path = entry.map_err(failed())?.path();
            match path.file_name().and_then(|name| name.to_str()?.split_once(AT)) {
                Some((container_id, ifname)) => found
                    .gone
                    .push(Attachment { container_id: container_id.to_owned(), ifname: ifname.to_owned() }),
                None => found.strangers.push(path),
            }
        }
        Ok(found)
    }

    fn path(&self, Attachment { container_id, ifname }: &Attachment) -> PathBuf {
        self.directory.join(format!("{container_id}{AT}{ifname}"))
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeletionQueueError {
    let path = path.to_owned();
    move |source| DeletionQueueError { operation, path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn attachment(ifname: &str) -> Attachment {
        Attachment { container_id: "c.1".to_owned(), ifname: ifname.to_owned() }
    }

    #[test]
    fn what_is_left_by_the_socket_is_found_in_the_run_directory() {
        let run_dir = tempfile::tempdir().unwrap();
        let (plugin, agent) =
            (DeletionQueue::beside(&run_dir.path().join("agent.sock")), DeletionQueue::of(run_dir.path()));
        assert_eq!(agent.read().unwrap(), Found::default());
        // the kernel takes an '@' in the name of a device
        for ifname in ["eth0", "eth0", "a@b"] {
            plugin.leave(&attachment(ifname)).unwrap();
        }
        let stranger = agent.directory().join("README");
        fs::write(&stranger, "").unwrap();
        let mut found = agent.read().unwrap();
        found.gone.sort();
        assert_eq!(found.gone, [attachment("a@b"), attachment("eth0")]);
        assert_eq!(found.strangers, [stranger]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(agent.directory()), mode(&agent.path(&attachment("eth0")))), (0o700, 0o600));
        for ifname in ["eth0", "eth0", "a@b"] {
            agent.remove(&attachment(ifname)).unwrap();
        }
        assert!(agent.read().unwrap().gone.is_empty());
    }

    #[test]
    fn without_a_run_directory_there_is_no_note() {
        let parent = tempfile::tempdir().unwrap();
        let run_dir = parent.path().join("run");
        let error = DeletionQueue::of(&run_dir).leave(&attachment("eth0")).unwrap_err().to_string();
        assert!(error.starts_with(&format!("create {}/gone: ", run_dir.display())), "{error}");
        assert!(!run_dir.exists());
    }
}
