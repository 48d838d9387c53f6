//! One agent per run directory: a file lock that ends with its process, and the API socket.
//!
//! The lock, not the socket, says whether an agent runs: a socket file outlives a killed agent.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tokio::net::UnixListener;

/// File names in the run directory.
const SOCKET: &str = "agent.sock";
const LOCK: &str = "agent.lock";

/// Error while the run directory is claimed.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("run_dir {run_dir} is in use by another agent (pid {pid}); stop it, or choose another run_dir")]
    Running { run_dir: PathBuf, pid: String },
    #[error("cannot {operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
}

/// Holds the lock of a run directory.
#[derive(Debug)]
pub struct Instance {
    run_dir: PathBuf,
    _lock: Flock<File>,
}

/// Path of the API socket.
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKET)
}

/// Files that an agent leaves in its run directory.
pub fn leftovers(run_dir: &Path) -> [PathBuf; 2] {
    [run_dir.join(SOCKET), run_dir.join(LOCK)]
}

impl Instance {
    /// Creates the directory and takes the lock.
    pub fn acquire(run_dir: &Path) -> Result<Self, InstanceError> {
        fs::create_dir_all(run_dir).map_err(io_error("create", run_dir))?;
        let path = run_dir.join(LOCK);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(io_error("open", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                lock.set_len(0).map_err(io_error("truncate", &path))?;
                writeln!(lock, "{}", std::process::id()).map_err(io_error("write", &path))?;
                Ok(Self { run_dir: run_dir.to_owned(), _lock: lock })
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(io_error("read", &path))?;
                Err(InstanceError::Running { run_dir: run_dir.to_owned(), pid: pid.trim().to_owned() })
            }
            Err((_, errno)) => Err(io_error("lock", &path)(errno.into())),
        }
    }

    /// Listens on the socket. It is replaced atomically, so clients never find it absent or with a
    /// wrong mode.
    pub fn listen(&self) -> Result<UnixListener, InstanceError> {
        let path = socket_path(&self.run_dir);
        let fresh = self.run_dir.join(format!("{SOCKET}.{}", std::process::id()));
        remove(&fresh)?;
        let listener = UnixListener::bind(&fresh).map_err(io_error("bind", &fresh))?;
        fs::set_permissions(&fresh, Permissions::from_mode(0o600)).map_err(io_error("chmod", &fresh))?;
        fs::rename(&fresh, &path).map_err(io_error("rename to", &path))?;
        Ok(listener)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // the lock file stays: if it were removed, two agents could lock two files of the same name
        if let Err(error) = remove(&socket_path(&self.run_dir)) {
            tracing::warn!(%error, "cannot remove the API socket on exit");
        }
    }
}

/// PID of the agent that runs with `run_dir`. Creates nothing.
pub fn running(run_dir: &Path) -> Result<Option<String>, InstanceError> {
    let path = run_dir.join(LOCK);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("open", &path)(error)),
    };
    let mut pid = String::new();
    file.read_to_string(&mut pid).map_err(io_error("read", &path))?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_unlocked) => Ok(None),
        Err((_, Errno::EWOULDBLOCK)) => Ok(Some(pid.trim().to_owned())),
        Err((_, errno)) => Err(io_error("lock", &path)(errno.into())),
    }
}

fn remove(path: &Path) -> Result<(), InstanceError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstanceError {
    let path = path.to_owned();
    move |source| InstanceError::Io { operation, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_agent_is_refused_and_the_error_names_the_pid_of_the_first() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(running(directory.path()).unwrap(), None);
        let first = Instance::acquire(directory.path()).unwrap();
        let error = Instance::acquire(directory.path()).unwrap_err();
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
        assert_eq!(running(directory.path()).unwrap(), Some(std::process::id().to_string()));
        drop(first);
        assert_eq!(running(directory.path()).unwrap(), None);
        Instance::acquire(directory.path()).unwrap();
    }

    #[tokio::test]
    async fn stale_socket_of_a_killed_agent_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let dead = std::os::unix::net::UnixListener::bind(socket_path(directory.path())).unwrap();
        drop(dead);
        let instance = Instance::acquire(directory.path()).unwrap();
        let listener = instance.listen().unwrap();
        let mode = fs::metadata(socket_path(directory.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::os::unix::net::UnixStream::connect(socket_path(directory.path())).unwrap();
        drop(listener);
        drop(instance);
        assert!(!socket_path(directory.path()).exists());
    }
}
