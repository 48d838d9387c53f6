//! What the cluster last was, on disk: a file of lines, one per change, the last of an object counts.
//!
//! A change costs a line, however large the cluster is. When most lines count no more, the file is written anew beside
//! itself and renamed. Its modification time says when it was last known to be right. A line that was being written
//! when the machine died ends the file. Nothing here is trusted longer than until the API server answers.

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

/// In the state directory.
pub(super) const FILE: &str = "cluster.jsonl";
/// Rises with every change of what a line means.
const VERSION: u32 = 4;
/// So many lines that do not count are no reason to write the file anew.
const SLACK: usize = 1_000;
/// How often the time of the last contact is written.
const TOUCH: Duration = Duration::from_secs(30);
/// So much does not wait until it is time.
const MUCH: usize = 256 << 10;
/// More than this does not wait for a disk that takes nothing.
const PENDING_MAX: usize = 16 << 20;

/// Extension of the file while it is written anew.
const DRAFT: &str = "draft";

/// Everything of this module below a state directory, there or not: for who removes it.
pub fn files(state_dir: &Path) -> [PathBuf; 2] {
    let file = state_dir.join(FILE);
    [file.with_extension(DRAFT), file]
}

/// The first line.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    version: u32,
    node: String,
}

/// Any other line.
#[derive(Serialize, Deserialize)]
struct Entry<K, O> {
    key: K,
    /// `None`: it is gone.
    is: Option<O>,
}

/// What was on disk.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) objects: Vec<Object>,
    /// When that was right; `None`: nothing is known.
    pub(super) time: Option<SystemTime>,
}

/// The file, and what is not in it yet.
#[derive(Debug)]
pub(super) struct Cache {
    pending: Vec<u8>,
    pending_lines: usize,
    disk: Option<Disk>,
    writing: Option<JoinHandle<(Disk, Vec<u8>, usize)>>,
    touched: Instant,
    /// What came of the last write.
    trouble: Option<String>,
}

/// The file.
#[derive(Debug)]
struct Disk {
    path: PathBuf,
    header: Header,
    file: Option<File>,
    /// Up to here the file is right.
    length: u64,
    lines: usize,
    trouble: Option<String>,
}

impl Cache {
    /// Reads what is there, for this node. What cannot be used is said, and forgotten.
    pub(super) fn open(path: &Path, node: &str) -> (Self, Known) {
        let header = Header { version: VERSION, node: node.to_owned() };
        let mut disk = Disk { path: path.to_owned(), header, file: None, length: 0, lines: 0, trouble: None };
        let known = match disk.load() {
            Ok(known) => known,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Known::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "what the cluster last was cannot be used");
                disk.file = None;
                Known::default()
            }
        };
        let cache = Self {
            pending: Vec::new(),
            pending_lines: 0,
            disk: Some(disk),
            writing: None,
            touched: Instant::now(),
            trouble: None,
        };
        (cache, known)
    }

    /// To be written with the next [`Self::save`].
    pub(super) fn note(&mut self, event: &SourceEvent) {
        let line = match event {
            SourceEvent::Upsert(object) => serde_json::to_vec(&Entry { key: object.key(), is: Some(object) }),
            SourceEvent::Remove(key, _) => serde_json::to_vec(&Entry { key, is: None::<Object> }),
            SourceEvent::Synced => return,
        };
        match line {
            Ok(line) => {
                self.pending.extend_from_slice(&line);
                self.pending.push(b'\n');
                self.pending_lines += 1;
            }
            Err(error) => tracing::error!(%error, "an object cannot be kept on disk"),
        }
    }

    /// Whether [`Self::save`] is due before its time: a first list is long, and waits in memory.
    pub(super) fn has_much(&self) -> bool {
        self.pending.len() >= MUCH && !self.is_writing() && self.trouble.is_none()
    }

    /// Begins to write what is noted. `live`: how many objects there are. Whether [`Self::trouble`] may have changed.
    pub(super) async fn save(&mut self, live: usize, in_contact: bool) -> bool {
        let before = self.trouble();
        if self.is_writing() {
            return false;
        }
        self.written().await;
        let touch = in_contact && self.touched.elapsed() >= TOUCH;
        if (!self.pending.is_empty() || touch)
            && let Some(mut disk) = self.disk.take()
        {
            if touch {
                self.touched = Instant::now();
            }
            let (lines, count) = (std::mem::take(&mut self.pending), std::mem::take(&mut self.pending_lines));
            self.writing = Some(tokio::task::spawn_blocking(move || {
                let left = disk.write(&lines, count, live, in_contact);
                if left { (disk, lines, count) } else { (disk, Vec::new(), 0) }
            }));
        }
        self.trouble != before
    }

    /// Everything is on disk, and stays there.
    pub(super) async fn close(&mut self, in_contact: bool) {
        self.written().await;
        let Some(disk) = &mut self.disk else { return };
        let left = disk.write(&self.pending, self.pending_lines, usize::MAX / 4, in_contact);
        self.trouble.clone_from(&disk.trouble);
        if let (Some(file), false) = (&disk.file, left)
            && let Err(error) = file.sync_all()
        {
            tracing::warn!(path = %disk.path.display(), %error, "what the cluster is may not be on disk");
        }
    }

    /// Why the next agent may know less than this one.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.clone()
    }

    fn is_writing(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| !writing.is_finished())
    }

    /// Waits for the last write.
    async fn written(&mut self) {
        let Some(writing) = self.writing.take() else { return };
        match writing.await {
            Ok((disk, mut left, count)) => {
                left.append(&mut self.pending);
                self.pending = left;
                self.pending_lines += count;
                self.trouble.clone_from(&disk.trouble);
                self.disk = Some(disk);
            }
            Err(error) => tracing::error!(%error, "keeping what the cluster is: the task ended"),
        }
        if self.pending.len() > PENDING_MAX {
            // what is on disk would be wrong without what is lost here
            tracing::warn!("what the cluster is cannot be kept: the disk takes nothing");
            self.pending = Vec::new();
            self.pending_lines = 0;
            if let Some(disk) = self.disk.take() {
                let _there = fs::remove_file(&disk.path);
            }
        }
    }
}

impl Disk {
    fn load(&mut self) -> io::Result<Known> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        let time = file.metadata()?.modified()?;
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line)?;
        let header: Header = serde_json::from_slice(&line)?;
        if header != self.header {
            let Header { version, node } = header;
            return Err(io::Error::other(format!("it is of version {version} and node {node}")));
        }
        let mut length = line.len() as u64;
        let (mut objects, mut lines) = (HashMap::new(), 0);
        loop {
            line.clear();
            reader.read_until(b'\n', &mut line)?;
            if !line.ends_with(b"\n") {
                break;
            }
            // what follows a line that is broken was written after it, and cannot be told apart from it
            let Ok(entry) = serde_json::from_slice::<Entry<ObjectKey, Object>>(&line) else {
                tracing::warn!(path = %self.path.display(), line = lines + 2, "a broken line: the rest is left out");
                break;
            };
            length += line.len() as u64;
            lines += 1;
            match entry.is {
                Some(object) => objects.insert(entry.key, object),
                None => objects.remove(&entry.key),
            };
        }
        drop(reader);
        (self.file, self.length, self.lines) = (Some(file), length, lines);
        Ok(Known { objects: objects.into_values().collect(), time: Some(time) })
    }

    /// Appends these lines. Whether they are left to be written.
    fn write(&mut self, lines: &[u8], count: usize, live: usize, in_contact: bool) -> bool {
        let outdated = |lines: usize| lines > live.saturating_mul(2) + SLACK;
        let done = self.append(lines, count).and_then(|()| {
            if outdated(self.lines) {
                self.compact()?;
            }
            let at = SystemTime::now();
            match &self.file {
                Some(file) if in_contact => file.set_modified(at),
                _ => Ok(()),
            }
        });
        self.trouble = done.err().map(|error| {
            format!(
                "{}: {error}: an agent that starts without an API server would not know this",
                self.path.display()
            )
        });
        // lines that were appended are in the file, whatever went wrong then
        self.trouble.is_some() && !lines.is_empty() && self.file.is_none()
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
                // to be opened again, and cut where it was right
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

    /// An empty file, in the place of what is there.
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

    /// Writes the file anew, with the lines that count.
    fn compact(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut last = HashMap::new();
        file.seek(SeekFrom::Start(0))?;
        for (number, line) in BufReader::new(&*file).split(b'\n').enumerate().skip(1) {
            let entry: Entry<ObjectKey, serde::de::IgnoredAny> = serde_json::from_slice(&line?)?;
            last.insert(hash(&entry.key), (number, entry.is.is_some()));
        }
        let draft = self.path.with_extension(DRAFT);
        let mut out = BufWriter::new(File::create(&draft)?);
        let header = self.header_line()?;
        out.write_all(&header)?;
        let (mut length, mut lines) = (header.len() as u64, 0);
        let Some(file) = &mut self.file else { return Ok(()) };
        file.seek(SeekFrom::Start(0))?;
        let counting: std::collections::HashSet<usize> =
            last.into_values().filter(|(_, there)| *there).map(|(number, _)| number).collect();
        for (number, line) in BufReader::new(&*file).split(b'\n').enumerate().skip(1) {
            let line = line?;
            if counting.contains(&number) {
                out.write_all(&line)?;
                out.write_all(b"\n")?;
                length += line.len() as u64 + 1;
                lines += 1;
            }
        }
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&draft, &self.path)?;
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
