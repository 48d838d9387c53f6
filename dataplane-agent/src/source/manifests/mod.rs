//! Source `manifests`: watches a directory of Kubernetes objects in YAML and JSON.
//!
//! Decides when to scan ([`watch`]), which files changed ([`files`]), what they declare ([`parse`])
//! and which declaration applies ([`declarations`]). Sends the difference to what was sent before;
//! a burst of changes is one scan.

mod declarations;
mod files;
mod parse;
mod watch;

use std::{
    collections::{BTreeSet, HashSet},
    ffi::OsString,
    future::Future,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::JoinError};

use self::{
    declarations::Declarations,
    files::{Files, Scan},
    watch::DirectoryWatch,
};
use super::{Problem, Problems, conflicts::ConflictResolver};
use crate::state::{Object, ObjectKey, SourceEvent};

/// Changes closer together than this are one scan...
const BURST_GAP: Duration = Duration::from_millis(20);
/// ...but a scan is delayed by at most this.
const BURST_MAX: Duration = Duration::from_millis(200);
/// Bounds the delay if an inotify event is lost.
const RESCAN: Duration = Duration::from_secs(20);
/// The scan interval without inotify.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(1);
/// Delay before a file that is being written, or just changed, is read again.
const RESCAN_SOON: Duration = Duration::from_millis(100);
/// How long the first sync waits for files that are being written: an object missing from it counts
/// as deleted.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// Why the source cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("cannot read manifest directory {directory}: {source}")]
    Directory { directory: PathBuf, source: io::Error },
    #[error("scan of manifest directory {directory} failed: {source}")]
    Scan { directory: PathBuf, source: JoinError },
}

/// The source.
#[derive(Debug)]
pub struct ManifestSource {
    directory: PathBuf,
    events: mpsc::Sender<SourceEvent>,
    problems: Problems,
    watch: Option<DirectoryWatch>,
    /// Device and inode of the watched directory.
    watched: Option<(u64, u64)>,
    reader: Reader,
    synced: bool,
}

/// Reads a directory without watching it: the objects it declares, and which of them were
/// delivered.
#[derive(Debug, Default)]
pub struct Reader {
    files: Files,
    declarations: Declarations,
    conflicts: ConflictResolver,
    /// Pods of other nodes are ignored.
    node: Option<String>,
}

/// The result of a scan.
struct ScanResult {
    changes: Vec<SourceEvent>,
    problems: BTreeSet<Problem>,
    scan: io::Result<Scan>,
}

impl ManifestSource {
    /// Creates a source for `directory`, which must exist. Objects go to `events`, problems to
    /// `problems`.
    pub fn new(
        directory: impl Into<PathBuf>,
        events: mpsc::Sender<SourceEvent>,
        problems: Problems,
    ) -> Result<Self, ManifestError> {
        let directory = directory.into();
        // watch before the first scan, so that no change falls between the two
        std::fs::read_dir(&directory)
            .map_err(|source| ManifestError::Directory { directory: directory.clone(), source })?;
        // events use the watched path: it must be absolute
        let directory = std::path::absolute(&directory)
            .map_err(|source| ManifestError::Directory { directory: directory.clone(), source })?;
        // on failure the first scan tries again and reports the problem
        let watch = DirectoryWatch::new(&directory).ok();
        let reader = Reader::default();
        Ok(Self { directory, events, problems, watch, watched: None, reader, synced: false })
    }

    /// Also delivers the pods of this node.
    #[must_use]
    pub fn on_node(mut self, name: &str) -> Self {
        self.reader.node = Some(name.to_owned());
        self
    }

    /// Sends all objects of the directory, then every change, until `shutdown` or until the
    /// receiver is gone.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), ManifestError> {
        let mut shutdown = std::pin::pin!(shutdown);
        let started = Instant::now();
        loop {
            let result = tokio::select! {
                () = &mut shutdown => return Ok(()),
                result = self.scan() => result?,
            };
            let scan = self.finish_scan(result.scan, result.problems);
            let delivered = tokio::select! {
                () = &mut shutdown => return Ok(()),
                delivered = deliver(&self.events, result.changes) => delivered,
            };
            let settled = !scan.being_written || started.elapsed() >= SETTLE_MAX;
            let complete = scan.directory.is_some() && settled;
            if delivered.is_err() || (complete && self.sync().await.is_err()) {
                return Ok(());
            }
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                () = self.wait_for_change(scan) => {}
            }
        }
    }

    /// Scans on a thread that may block.
    async fn scan(&mut self) -> Result<ScanResult, ManifestError> {
        let mut reader = std::mem::take(&mut self.reader);
        let directory = self.directory.clone();
        let writing = self.watch.as_ref().map(DirectoryWatch::writing).unwrap_or_default();
        let (reader, result) = tokio::task::spawn_blocking(move || {
            let result = reader.scan(&directory, &writing);
            (reader, result)
        })
        .await
        .map_err(|source| ManifestError::Scan { directory: self.directory.clone(), source })?;
        self.reader = reader;
        Ok(result)
    }

    /// Moves the watch if the path leads to another directory, and publishes the problems.
    fn finish_scan(&mut self, scan: io::Result<Scan>, mut problems: BTreeSet<Problem>) -> Scan {
        let mut add_problem = |message: String| {
            problems.insert(Problem { subject: self.directory.display().to_string(), message });
        };
        let mut scan = scan.unwrap_or_else(|error| {
            add_problem(format!("cannot read directory: {error}; the objects read last stay applied"));
            Scan::default()
        });
        if self.watched.is_none() || scan.directory != self.watched {
            self.watched = scan.directory;
            match rewatch(&mut self.watch, &self.directory) {
                // changes since the scan were not watched
                Ok(()) => scan.too_recent = true,
                Err(error) => {
                    self.watched = None;
                    if scan.directory.is_some() {
                        add_problem(format!(
                            "cannot watch directory: {error}; scanning it every {} s instead",
                            RESCAN_UNWATCHED.as_secs()
                        ));
                    }
                }
            }
        }
        self.problems.replace(problems);
        scan
    }

    async fn sync(&mut self) -> Result<(), mpsc::error::SendError<SourceEvent>> {
        if !std::mem::replace(&mut self.synced, true) {
            self.events.send(SourceEvent::Synced).await?;
        }
        Ok(())
    }

    /// Waits until the next scan is due.
    async fn wait_for_change(&self, scan: Scan) {
        let at_most = if scan.being_written || scan.too_recent {
            RESCAN_SOON
        } else if self.watched.is_none() {
            RESCAN_UNWATCHED
        } else {
            RESCAN
        };
        let Some(watch) = &self.watch else { return tokio::time::sleep(at_most).await };
        if tokio::time::timeout(at_most, watch.changed()).await.is_err() {
            return;
        }
        let burst = async { while tokio::time::timeout(BURST_GAP, watch.changed()).await.is_ok() {} };
        if tokio::time::timeout(BURST_MAX, burst).await.is_err() {
            tracing::debug!("manifest directory keeps changing; scanning now");
        }
    }
}

impl Reader {
    /// Reads the directory once. Returns the events since the last call, and the current problems.
    pub fn read(&mut self, directory: &Path) -> io::Result<(Vec<SourceEvent>, BTreeSet<Problem>)> {
        let ScanResult { changes, problems, scan } = self.scan(directory, &HashSet::new());
        scan?;
        Ok((changes, problems))
    }

    fn scan(&mut self, directory: &Path, writing: &HashSet<OsString>) -> ScanResult {
        let scan = self.files.scan(directory, writing, &mut self.declarations);
        let changes = self
            .declarations
            .changes()
            .into_iter()
            .map(|event| remove_if_remote(event, self.node.as_deref()));
        let changes = self.conflicts.apply(changes);
        ScanResult { changes, problems: self.problems(), scan }
    }

    fn problems(&self) -> BTreeSet<Problem> {
        let conflicts = self.conflicts.waiting_reasons().map(|(key, message)| {
            let file = self.declarations.file_of(key).unwrap_or_default().to_string_lossy();
            Problem { subject: format!("{file}: {key}"), message }
        });
        self.files.problems().chain(self.declarations.duplicates()).chain(conflicts).collect()
    }
}

/// Turns pods of other nodes into removals.
fn remove_if_remote(event: SourceEvent, node: Option<&str>) -> SourceEvent {
    match event {
        SourceEvent::Upsert(Object::Pod(pod)) if Some(pod.node.as_str()) != node => {
            SourceEvent::Remove(ObjectKey::Pod(pod.name), pod.owner)
        }
        event => event,
    }
}

/// Watches the directory the path leads to now.
fn rewatch(watch: &mut Option<DirectoryWatch>, directory: &Path) -> notify::Result<()> {
    match watch {
        Some(watch) => watch.rewatch(),
        None => {
            *watch = Some(DirectoryWatch::new(directory)?);
            Ok(())
        }
    }
}

async fn deliver(
    events: &mpsc::Sender<SourceEvent>,
    changes: Vec<SourceEvent>,
) -> Result<(), mpsc::error::SendError<SourceEvent>> {
    for change in changes {
        events.send(change).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
