//! Source `manifests`: a watched directory of Kubernetes objects as YAML and JSON.
//!
//! Owns when to look ([`watch`]), which files changed ([`files`]), what they say ([`parse`]) and whom to believe
//! ([`claims`]). What is sent is the difference to what was sent before; a burst of changes is one scan.

mod claims;
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
    claims::Claims,
    files::{Files, Scan},
    watch::Watch,
};
use super::{Problem, Problems, conflicts::Conflicts};
use crate::state::{Object, ObjectKey, SourceEvent};

/// Changes closer together than this are taken together...
const QUIET: Duration = Duration::from_millis(20);
/// ...but none waits longer than this for the next.
const QUIET_MAX: Duration = Duration::from_millis(200);
/// Should an event get lost, this is how long it matters.
const RESCAN: Duration = Duration::from_secs(20);
/// The same where there are no events.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(1);
/// To look again at a file that is being written, or changed a moment ago.
const RESCAN_SOON: Duration = Duration::from_millis(100);
/// The first scan waits this long for files that are being written: what it leaves out counts as gone.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// Why there is no source.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("manifests: read directory {directory}: {source}")]
    Directory { directory: PathBuf, source: io::Error },
    #[error("manifests: scan of {directory} did not end: {source}")]
    Scan { directory: PathBuf, source: JoinError },
}

/// The source.
#[derive(Debug)]
pub struct ManifestSource {
    directory: PathBuf,
    events: mpsc::Sender<SourceEvent>,
    problems: Problems,
    watch: Option<Watch>,
    /// The directory that is watched, if one is.
    watched: Option<(u64, u64)>,
    reader: Reader,
    synced: bool,
}

/// What is known of the directory, and what of it was sent.
#[derive(Debug, Default)]
struct Reader {
    files: Files,
    claims: Claims,
    conflicts: Conflicts,
    /// Pods count where they run.
    node: Option<String>,
}

/// What a look at the directory came to.
struct Look {
    changes: Vec<SourceEvent>,
    problems: BTreeSet<Problem>,
    scan: io::Result<Scan>,
}

impl ManifestSource {
    /// A source of the objects in `directory`, which must exist. Objects go to `events`, what is wrong to `problems`.
    pub fn new(
        directory: impl Into<PathBuf>,
        events: mpsc::Sender<SourceEvent>,
        problems: Problems,
    ) -> Result<Self, ManifestError> {
        let directory = directory.into();
        // events are wanted from before the first scan: nothing falls between the two
        std::fs::read_dir(&directory)
            .map_err(|source| ManifestError::Directory { directory: directory.clone(), source })?;
        // events name the files by the path that is watched: one without parts that could be taken out
        let directory = std::path::absolute(&directory)
            .map_err(|source| ManifestError::Directory { directory: directory.clone(), source })?;
        // without: the first scan tries again, and complains
        let watch = Watch::new(&directory).ok();
        let reader = Reader::default();
        Ok(Self { directory, events, problems, watch, watched: None, reader, synced: false })
    }

    /// Reads the pods of this node, too.
    #[must_use]
    pub fn on_node(mut self, name: &str) -> Self {
        self.reader.node = Some(name.to_owned());
        self
    }

    /// Sends what the directory says, then every change, until `shutdown`, or until nobody listens.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), ManifestError> {
        let mut shutdown = std::pin::pin!(shutdown);
        let started = Instant::now();
        loop {
            let look = tokio::select! {
                () = &mut shutdown => return Ok(()),
                look = self.look() => look?,
            };
            let scan = self.conclude(look.scan, look.problems);
            let delivered = tokio::select! {
                () = &mut shutdown => return Ok(()),
                delivered = deliver(&self.events, look.changes) => delivered,
            };
            let settled = !scan.unsettled || started.elapsed() >= SETTLE_MAX;
            let complete = scan.directory.is_some() && settled;
            if delivered.is_err() || (complete && self.sync().await.is_err()) {
                return Ok(());
            }
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                () = self.rest(scan) => {}
            }
        }
    }

    /// Scans, off the runtime's threads.
    async fn look(&mut self) -> Result<Look, ManifestError> {
        let mut reader = std::mem::take(&mut self.reader);
        let directory = self.directory.clone();
        let writing = self.watch.as_ref().map(Watch::writing).unwrap_or_default();
        let (reader, look) = tokio::task::spawn_blocking(move || {
            let look = reader.look(&directory, &writing);
            (reader, look)
        })
        .await
        .map_err(|source| ManifestError::Scan { directory: self.directory.clone(), source })?;
        self.reader = reader;
        Ok(look)
    }

    /// Keeps the watch where the directory is, and publishes what is wrong.
    fn conclude(&mut self, scan: io::Result<Scan>, mut problems: BTreeSet<Problem>) -> Scan {
        let mut complain = |message: String| {
            problems.insert(Problem { subject: self.directory.display().to_string(), message });
        };
        let mut scan = scan.unwrap_or_else(|error| {
            complain(format!("read directory: {error}; what it said last still counts"));
            Scan::default()
        });
        if self.watched.is_none() || scan.directory != self.watched {
            self.watched = scan.directory;
            match follow(&mut self.watch, &self.directory) {
                // what changed since the scan was not watched
                Ok(()) => scan.too_fresh = true,
                Err(error) => {
                    self.watched = None;
                    if scan.directory.is_some() {
                        complain(format!("watch: {error}; looking every {} s", RESCAN_UNWATCHED.as_secs()));
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

    /// Until there is reason to look again.
    async fn rest(&self, scan: Scan) {
        let at_most = if scan.unsettled || scan.too_fresh {
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
        let burst = async { while tokio::time::timeout(QUIET, watch.changed()).await.is_ok() {} };
        if tokio::time::timeout(QUIET_MAX, burst).await.is_err() {
            tracing::debug!("source: changes go on");
        }
    }
}

impl Reader {
    fn look(&mut self, directory: &Path, writing: &HashSet<OsString>) -> Look {
        let scan = self.files.scan(directory, writing, &mut self.claims);
        let changes = self.claims.changes().into_iter().map(|event| local(event, self.node.as_deref()));
        let changes = self.conflicts.apply(changes);
        Look { changes, problems: self.problems(), scan }
    }

    fn problems(&self) -> BTreeSet<Problem> {
        let refused = self.conflicts.refused().map(|(key, message)| {
            let file = self.claims.file_of(key).unwrap_or_default().to_string_lossy();
            Problem { subject: format!("{file}: {key}"), message }
        });
        self.files.problems().chain(self.claims.duplicates()).chain(refused).collect()
    }
}

/// A pod of another node is none here; one that moved has gone.
fn local(event: SourceEvent, node: Option<&str>) -> SourceEvent {
    match event {
        SourceEvent::Upsert(Object::Pod(pod)) if Some(pod.node.as_str()) != node => {
            SourceEvent::Remove(ObjectKey::Pod(pod.name), pod.owner)
        }
        event => event,
    }
}

/// Watches what has the directory's name now.
fn follow(watch: &mut Option<Watch>, directory: &Path) -> notify::Result<()> {
    match watch {
        Some(watch) => watch.follow(),
        None => {
            *watch = Some(Watch::new(directory)?);
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
