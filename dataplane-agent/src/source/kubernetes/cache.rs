//! The last known cluster state on disk: a file of JSON lines, one per change; the last line of an
//! object counts.
//!
//! A change appends one line, independent of the cluster size. When most lines are outdated, the
//! file is compacted into a temporary file and renamed. The modification time is the last time the
//! content was current. A crash can truncate only the last line. The content is used only until the
//! API server answers.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, BufRead as _, BufReader, BufWriter, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::{task::JoinHandle, time::Instant};

use crate::state::{Object, ObjectKey, SourceEvent};

/// File name in the state directory.
pub(super) const FILE: &str = "cluster.jsonl";
/// Incremented with every change of the line format.
const VERSION: u32 = 4;
/// Outdated lines tolerated before compaction.
const OUTDATED_LINES_MIN: usize = 1_000;
/// How often the modification time is updated.
const TOUCH_INTERVAL: Duration = Duration::from_secs(30);
/// Pending bytes that are written before the regular interval.
const FLUSH_BYTES: usize = 256 << 10;
/// Pending bytes above which the cache gives up on a disk that does not accept writes.
const PENDING_BYTES_MAX: usize = 16 << 20;

/// File extension during compaction.
const TEMP_EXTENSION: &str = "draft";

/// The files of this cache in a state directory, whether or not they exist. For cleanup.
pub fn files(state_dir: &Path) -> [PathBuf; 2] {
    let file = state_dir.join(FILE);
    [file.with_extension(TEMP_EXTENSION), file]
}

/// The first line.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    version: u32,
    node: String,
}

/// Any other line. The names are part of the file format.
#[derive(Serialize, Deserialize)]
struct Entry<K, O> {
    key: K,
    /// `None`: the object was deleted.
    #[serde(rename = "is")]
    object: Option<O>,
}

/// The state read from disk.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    pub(super) objects: Vec<Object>,
    /// When it was current; `None`: there is none.
    pub(super) time: Option<SystemTime>,
}

/// The file and the lines not yet written to it.
#[derive(Debug)]
pub(super) struct Cache {
    pending: Vec<u8>,
    pending_lines: usize,
    disk: Option<Disk>,
    writing: Option<JoinHandle<(Disk, Vec<u8>, usize)>>,
    last_touch: Instant,
    /// The error of the last write.
    last_error: Option<String>,
}

/// The file.
#[derive(Debug)]
struct Disk {
    path: PathBuf,
    header: Header,
    file: Option<File>,
    /// Length of the valid content.
    length: u64,
    lines: usize,
    last_error: Option<String>,
}

impl Cache {
    /// Opens the cache of this node and reads its content. Unusable content is logged and
    /// discarded.
    pub(super) fn open(path: &Path, node: &str) -> (Self, Snapshot) {
        let header = Header { version: VERSION, node: node.to_owned() };
        let mut disk =
            Disk { path: path.to_owned(), header, file: None, length: 0, lines: 0, last_error: None };
        let snapshot = match disk.load() {
            Ok(snapshot) => snapshot,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Snapshot::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot read cached cluster state; starting without it");
                disk.file = None;
                Snapshot::default()
            }
        };
        let cache = Self {
            pending: Vec::new(),
            pending_lines: 0,
            disk: Some(disk),
            writing: None,
            last_touch: Instant::now(),
            last_error: None,
        };
        (cache, snapshot)
    }

    /// Queues an event for the next [`Self::save`].
    pub(super) fn record(&mut self, event: &SourceEvent) {
        let line = match event {
            SourceEvent::Upsert(object) => {
                serde_json::to_vec(&Entry { key: object.key(), object: Some(object) })
            }
            SourceEvent::Remove(key, _) => serde_json::to_vec(&Entry { key, object: None::<Object> }),
            SourceEvent::Synced => return,
        };
        match line {
            Ok(line) => {
                self.pending.extend_from_slice(&line);
                self.pending.push(b'\n');
                self.pending_lines += 1;
            }
            Err(error) => tracing::error!(%error, "cannot encode object for the cluster state cache"),
        }
    }

    /// Whether [`Self::save`] should run before the regular interval, as during a long initial
    /// list.
    pub(super) fn should_flush(&self) -> bool {
        self.pending.len() >= FLUSH_BYTES && !self.is_writing() && self.last_error.is_none()
    }

    /// Starts to write the queued lines. `live` is the number of existing objects. Returns whether
    /// [`Self::last_error`] may have changed.
    pub(super) async fn save(&mut self, live: usize, connected: bool) -> bool {
        let before = self.last_error();
        if self.is_writing() {
            return false;
        }
        self.finish_write().await;
        let touch = connected && self.last_touch.elapsed() >= TOUCH_INTERVAL;
        if (!self.pending.is_empty() || touch)
            && let Some(mut disk) = self.disk.take()
        {
            if touch {
                self.last_touch = Instant::now();
            }
            let (lines, count) = (std::mem::take(&mut self.pending), std::mem::take(&mut self.pending_lines));
            self.writing = Some(tokio::task::spawn_blocking(move || {
                let unwritten = disk.write(&lines, count, live, connected);
                if unwritten { (disk, lines, count) } else { (disk, Vec::new(), 0) }
            }));
        }
        self.last_error != before
    }

    /// Writes everything that is queued and syncs the file.
    pub(super) async fn close(&mut self, connected: bool) {
        self.finish_write().await;
        let Some(disk) = &mut self.disk else { return };
        let unwritten = disk.write(&self.pending, self.pending_lines, usize::MAX / 4, connected);
        self.last_error.clone_from(&disk.last_error);
        if let (Some(file), false) = (&disk.file, unwritten)
            && let Err(error) = file.sync_all()
        {
            tracing::warn!(path = %disk.path.display(), %error, "cannot sync cluster state cache");
        }
    }

    /// The error of the last write, for `status`.
    pub(super) fn last_error(&self) -> Option<String> {
        self.last_error.clone()
    }

    fn is_writing(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| !writing.is_finished())
    }

    /// Waits for the last write and requeues lines it could not write.
    async fn finish_write(&mut self) {
        let Some(writing) = self.writing.take() else { return };
        match writing.await {
            Ok((disk, mut unwritten, count)) => {
                unwritten.append(&mut self.pending);
                self.pending = unwritten;
                self.pending_lines += count;
                self.last_error.clone_from(&disk.last_error);
                self.disk = Some(disk);
            }
            Err(error) => tracing::error!(%error, "task that writes the cluster state cache failed"),
        }
        if self.pending.len() > PENDING_BYTES_MAX {
            // the file would be wrong without the lines dropped here
            tracing::warn!(
                "cannot write cluster state cache: too much unwritten data; removing it, check the disk"
            );
            self.pending = Vec::new();
            self.pending_lines = 0;
            if let Some(disk) = self.disk.take() {
                let _missing = fs::remove_file(&disk.path);
            }
        }
    }
}

impl Disk {
    fn load(&mut self) -> io::Result<Snapshot> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        let time = file.metadata()?.modified()?;
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line)?;
        let header: Header = serde_json::from_slice(&line)?;
        if header != self.header {
            let Header { version, node } = header;
            return Err(io::Error::other(format!("file has version {version} for node {node}")));
        }
        let mut length = line.len() as u64;
        let (mut objects, mut lines) = (HashMap::new(), 0);
        loop {
            line.clear();
            reader.read_until(b'\n', &mut line)?;
            if !line.ends_with(b"\n") {
                break;
            }
            // lines after a corrupt line cannot be told apart from it
            let Ok(entry) = serde_json::from_slice::<Entry<ObjectKey, Object>>(&line) else {
                tracing::warn!(path = %self.path.display(), line = lines + 2, "cluster state cache has a corrupt line; ignoring the rest");
                break;
            };
            length += line.len() as u64;
            lines += 1;
            match entry.object {
                Some(object) => objects.insert(entry.key, object),
                None => objects.remove(&entry.key),
            };
        }
        drop(reader);
        (self.file, self.length, self.lines) = (Some(file), length, lines);
        Ok(Snapshot { objects: objects.into_values().collect(), time: Some(time) })
    }

    /// Appends the lines. Returns whether they must be written again.
    fn write(&mut self, lines: &[u8], count: usize, live: usize, connected: bool) -> bool {
        let outdated = |lines: usize| lines > live.saturating_mul(2) + OUTDATED_LINES_MIN;
        let done = self.append(lines, count).and_then(|()| {
            if outdated(self.lines) {
                self.compact()?;
            }
            let at = SystemTime::now();
            match &self.file {
                Some(file) if connected => file.set_modified(at),
                _ => Ok(()),
            }
        });
        self.last_error = done.err().map(|error| {
            format!(
                "cannot write {}: {error}; if the agent restarts while no API server is reachable, it starts from outdated state",
                self.path.display()
            )
        });
        // appended lines are in the file, even if a later step failed
        self.last_error.is_some() && !lines.is_empty() && self.file.is_none()
    }

    fn append(&mut self, lines: &[u8], count: usize) -> io::Result<()> {
        let appended = self.try_append(lines);
        match appended {
            Ok(()) => {
                self.length += lines.len() as u64;
                self.lines += count;
                Ok(())
            }
            Err(error) => {
                // reopen it and truncate it to the valid length
                self.file = None;
                Err(error)
            }
        }
    }

    fn try_append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(if self.length == 0 { self.create()? } else { self.reopen()? });
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        file.set_len(self.length)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(lines)
    }

    fn reopen(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.path)
    }

    /// Creates an empty file, replacing any other.
    fn create(&mut self) -> io::Result<File> {
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&self.path)?;
        let header = self.header_line()?;
        file.write_all(&header)?;
        (self.length, self.lines) = (header.len() as u64, 0);
        Ok(file)
    }

    /// Rewrites the file with the last line of each existing object.
    fn compact(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut last = HashMap::new();
        file.seek(SeekFrom::Start(0))?;
        for (number, line) in BufReader::new(&*file).split(b'\n').enumerate().skip(1) {
            let entry: Entry<ObjectKey, serde::de::IgnoredAny> = serde_json::from_slice(&line?)?;
            last.insert(hash(&entry.key), (number, entry.object.is_some()));
        }
        let temp_path = self.path.with_extension(TEMP_EXTENSION);
        let mut out = BufWriter::new(File::create(&temp_path)?);
        let header = self.header_line()?;
        out.write_all(&header)?;
        let (mut length, mut lines) = (header.len() as u64, 0);
        let Some(file) = &mut self.file else { return Ok(()) };
        file.seek(SeekFrom::Start(0))?;
        let current_lines: std::collections::HashSet<usize> =
            last.into_values().filter(|(_, exists)| *exists).map(|(number, _)| number).collect();
        for (number, line) in BufReader::new(&*file).split(b'\n').enumerate().skip(1) {
            let line = line?;
            if current_lines.contains(&number) {
                out.write_all(&line)?;
                out.write_all(b"\n")?;
                length += line.len() as u64 + 1;
                lines += 1;
            }
        }
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&temp_path, &self.path)?;
        (self.file, self.length, self.lines) = (Some(self.reopen()?), length, lines);
        Ok(())
    }

    fn header_line(&self) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(&self.header)?;
        line.push(b'\n');
        Ok(line)
    }
}

fn hash(key: &ObjectKey) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
