//! The queue of pods that were deleted while no agent ran: DEL adds an entry next to the agent's
//! socket, and the next agent removes the pod.
//!
//! DEL does not wait for an agent, so that a node with a broken agent can be drained. An entry is
//! an empty file whose name holds all data, so it cannot be incomplete.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use crate::protocol::Attachment;

/// Name of the queue's directory, the same in all versions: a plugin of one version writes for an
/// agent of another.
const DIRECTORY: &str = "gone";
/// Separates container ID and interface name. No container ID contains it.
const SEPARATOR: char = '@';

/// Why an entry cannot be added, read or removed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}: {source}")]
pub struct DeletionQueueError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The queue: a directory, created with the first entry.
#[derive(Clone, Debug)]
pub struct DeletionQueue {
    directory: PathBuf,
}

/// The content of the queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PendingDeletes {
    pub attachments: Vec<Attachment>,
    /// Files that are not entries of the queue.
    pub unknown_files: Vec<PathBuf>,
}

impl DeletionQueue {
    /// The queue of the agent with this run directory.
    pub fn in_run_dir(run_dir: &Path) -> Self {
        Self { directory: run_dir.join(DIRECTORY) }
    }

    /// The queue of the agent with this socket.
    pub fn next_to_socket(socket: &Path) -> Self {
        Self { directory: socket.with_file_name(DIRECTORY) }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Adds an entry. Does not create the run directory: without one, no agent would read the
    /// queue.
    pub fn add(&self, attachment: &Attachment) -> Result<(), DeletionQueueError> {
        match DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io_error("create", &self.directory)(error));
            }
            _ => {}
        }
        let path = self.path(attachment);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.open(&path).map(drop).map_err(io_error("create", &path))
    }

    /// Removes an entry. A missing entry is not an error.
    pub fn remove(&self, attachment: &Attachment) -> Result<(), DeletionQueueError> {
        let path = self.path(attachment);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Reads all entries.
    pub fn read(&self) -> Result<PendingDeletes, DeletionQueueError> {
        let failed = || io_error("read", &self.directory);
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(PendingDeletes::default()),
            entries => entries.map_err(failed())?,
        };
        let mut pending = PendingDeletes::default();
        for entry in entries {
            let path = entry.map_err(failed())?.path();
            match path.file_name().and_then(|name| name.to_str()?.split_once(SEPARATOR)) {
                Some((container_id, ifname)) => pending
                    .attachments
                    .push(Attachment { container_id: container_id.to_owned(), ifname: ifname.to_owned() }),
                None => pending.unknown_files.push(path),
            }
        }
        Ok(pending)
    }

    fn path(&self, Attachment { container_id, ifname }: &Attachment) -> PathBuf {
        self.directory.join(format!("{container_id}{SEPARATOR}{ifname}"))
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeletionQueueError {
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
    fn entry_added_by_the_plugin_is_read_by_the_agent() {
        let run_dir = tempfile::tempdir().unwrap();
        let (plugin, agent) = (
            DeletionQueue::next_to_socket(&run_dir.path().join("agent.sock")),
            DeletionQueue::in_run_dir(run_dir.path()),
        );
        assert_eq!(agent.read().unwrap(), PendingDeletes::default());
        // the kernel allows '@' in a device name
        for ifname in ["eth0", "eth0", "a@b"] {
            plugin.add(&attachment(ifname)).unwrap();
        }
        let unknown = agent.directory().join("README");
        fs::write(&unknown, "").unwrap();
        let mut pending = agent.read().unwrap();
        pending.attachments.sort();
        assert_eq!(pending.attachments, [attachment("a@b"), attachment("eth0")]);
        assert_eq!(pending.unknown_files, [unknown]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(agent.directory()), mode(&agent.path(&attachment("eth0")))), (0o700, 0o600));
        for ifname in ["eth0", "eth0", "a@b"] {
            agent.remove(&attachment(ifname)).unwrap();
        }
        assert!(agent.read().unwrap().attachments.is_empty());
    }

    #[test]
    fn no_entry_is_added_without_a_run_directory() {
        let parent = tempfile::tempdir().unwrap();
        let run_dir = parent.path().join("run");
        let error = DeletionQueue::in_run_dir(&run_dir).add(&attachment("eth0")).unwrap_err().to_string();
        assert!(error.starts_with(&format!("create {}/gone: ", run_dir.display())), "{error}");
        assert!(!run_dir.exists());
    }
}
