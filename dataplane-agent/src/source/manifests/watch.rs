//! Watches the directory by inotify. A timer covers lost events.

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

/// A file without writes for this long is considered complete.
const WRITER_IDLE: Duration = Duration::from_secs(1);

/// Watches the directory, and its name in the parent directory.
#[derive(Debug)]
pub(super) struct DirectoryWatch {
    watcher: RecommendedWatcher,
    state: Arc<WatchState>,
    directory: PathBuf,
}

/// State collected from events.
#[derive(Debug)]
struct WatchState {
    changed: Notify,
    /// Files that were modified and not closed by their writer yet.
    writing: Mutex<HashMap<OsString, Instant>>,
    directory: PathBuf,
}

impl DirectoryWatch {
    pub(super) fn new(directory: &Path) -> notify::Result<Self> {
        let state = Arc::new(WatchState {
            changed: Notify::new(),
            writing: Mutex::default(),
            directory: directory.to_owned(),
        });
        let handler = Arc::clone(&state);
        let mut watcher = notify::recommended_watcher(move |event| handler.on_event(event))?;
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
        // the path may lead to another directory later; events of the old one would not tell
        if let Some(parent) = parent(directory)
            && let Err(error) = watcher.watch(parent, RecursiveMode::NonRecursive)
        {
            tracing::info!(directory = %parent.display(), %error, "cannot watch parent of manifest directory; a replaced directory is noticed by the next timed scan");
        }
        Ok(Self { watcher, state, directory: directory.to_owned() })
    }

    /// Follows the path to another directory.
    pub(super) fn rewatch(&mut self) -> notify::Result<()> {
        if let Err(error) = self.watcher.unwatch(&self.directory) {
            tracing::debug!(%error, "watch ended with the removed directory");
        }
        self.watcher.watch(&self.directory, RecursiveMode::NonRecursive)
    }

    /// Returns once something changed since the last call.
    pub(super) async fn changed(&self) {
        self.state.changed.notified().await;
    }

    /// Files that are being written.
    pub(super) fn writing(&self) -> HashSet<OsString> {
        let mut writing = self.state.writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.retain(|_, last| last.elapsed() < WRITER_IDLE);
        writing.keys().cloned().collect()
    }
}

impl WatchState {
    fn on_event(&self, event: notify::Result<Event>) {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                tracing::warn!(%error, "error in manifest directory watch; scanning the directory");
                return self.changed.notify_one();
            }
        };
        if event.need_rescan() {
            // events were lost, perhaps the close of a file
            self.writing.lock().unwrap_or_else(PoisonError::into_inner).clear();
            return self.changed.notify_one();
        }
        let relevant = event.paths.is_empty() || event.paths.iter().any(|path| self.is_watched(path));
        // reading also opens and closes files
        let closed = event.kind == EventKind::Access(AccessKind::Close(AccessMode::Write));
        if !relevant || matches!(event.kind, EventKind::Access(_)) && !closed {
            return;
        }
        for name in event.paths.iter().filter_map(|path| path.file_name()) {
            self.track_writer(name, event.kind);
        }
        self.changed.notify_one();
    }

    fn track_writer(&self, name: &OsStr, kind: EventKind) {
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        match kind {
            EventKind::Modify(ModifyKind::Data(_)) => {
                writing.insert(name.to_owned(), Instant::now());
            }
            EventKind::Modify(ModifyKind::Metadata(_)) => {}
            // closed, or replaced by another file
            _ => {
                writing.remove(name);
            }
        }
    }

    /// Whether the path is the directory or a file in it.
    fn is_watched(&self, path: &Path) -> bool {
        path == self.directory || path.parent() == Some(&self.directory)
    }
}

fn parent(directory: &Path) -> Option<&Path> {
    directory.parent().filter(|parent| !parent.as_os_str().is_empty())
}
