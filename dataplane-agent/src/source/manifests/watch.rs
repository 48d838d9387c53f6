//! When to look at the directory again: inotify says so; a timer does, should it not.

use std::{
    collections::{HashMap, HashSet},
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::sync::Notify;

/// A writer that is silent for this long has left its file as it is.
const WRITER_SILENT: Duration = Duration::from_secs(1);

/// Watches the directory, and the name it has in its parent.
#[derive(Debug)]
pub(super) struct Watch {
    watcher: RecommendedWatcher,
    seen: Arc<Seen>,
    directory: PathBuf,
}

/// What the events said.
#[derive(Debug)]
struct Seen {
    changed: Notify,
    /// Files that were modified, and whose writer has not closed them yet.
    writing: Mutex<HashMap<OsString, Instant>>,
    directory: PathBuf,
}

impl Watch {
    pub(super) fn new(directory: &Path) -> notify::Result<Self> {
        let seen = Arc::new(Seen {
            changed: Notify::new(),
            writing: Mutex::default(),
            directory: directory.to_owned(),
        });
        let sink = Arc::clone(&seen);
        let mut watcher = notify::recommended_watcher(move |event| sink.take(event))?;
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
        // the name may be given to another directory: events of the old one would never say
        if let Some(parent) = parent(directory)
            && let Err(error) = watcher.watch(parent, RecursiveMode::NonRecursive)
        {
            tracing::info!(directory = %parent.display(), %error, "source: parent directory is not watched");
        }
        Ok(Self { watcher, seen, directory: directory.to_owned() })
    }

    /// The name leads to another directory now.
    pub(super) fn follow(&mut self) -> notify::Result<()> {
        if let Err(error) = self.watcher.unwatch(&self.directory) {
            tracing::debug!(%error, "source: the watch went with its directory");
        }
        self.watcher.watch(&self.directory, RecursiveMode::NonRecursive)
    }

    /// Returns when something happened since the last call.
    pub(super) async fn changed(&self) {
        self.seen.changed.notified().await;
    }

    /// Files that are being written.
    pub(super) fn writing(&self) -> HashSet<OsString> {
        let mut writing = self.seen.writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.retain(|_, last| last.elapsed() < WRITER_SILENT);
        writing.keys().cloned().collect()
    }
}

impl Seen {
    fn take(&self, event: notify::Result<Event>) {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                tracing::warn!(%error, "source: watch");
                return self.changed.notify_one();
            }
        };
        if event.need_rescan() {
            // events were lost, among them perhaps that a writer is done
            self.writing.lock().unwrap_or_else(PoisonError::into_inner).clear();
            return self.changed.notify_one();
        }
        let ours = event.paths.is_empty() || event.paths.iter().any(|path| self.is_ours(path));
        // our own reading opens and closes, too
        let closed = event.kind == EventKind::Access(AccessKind::Close(AccessMode::Write));
        if !ours || matches!(event.kind, EventKind::Access(_)) && !closed {
            return;
        }
        for name in event.paths.iter().filter_map(|path| path.file_name()) {
            self.note(name, event.kind);
        }
        self.changed.notify_one();
    }

    fn note(&self, name: &OsStr, kind: EventKind) {
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        match kind {
            EventKind::Modify(ModifyKind::Data(_)) => {
                writing.insert(name.to_owned(), Instant::now());
            }
            EventKind::Modify(ModifyKind::Metadata(_)) => {}
            // closed, or another file has the name now
            _ => {
                writing.remove(name);
            }
        }
    }

    /// In the directory, or the directory itself.
    fn is_ours(&self, path: &Path) -> bool {
        path == self.directory || path.parent() == Some(&self.directory)
    }
}

fn parent(directory: &Path) -> Option<&Path> {
    directory.parent().filter(|parent| !parent.as_os_str().is_empty())
}
