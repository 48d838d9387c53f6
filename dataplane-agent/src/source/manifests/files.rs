//! The manifest files of the directory: which exist, which changed, what they declare.
//!
//! A scan costs one `stat` per file; only files with another stamp are read. Files that are being
//! written are skipped.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    declarations::Declarations,
    parse::{Content, Declaration, Format, parse},
};
use crate::{source::Problem, state::ObjectKey};

/// A larger file is a mistake, not a manifest.
const SIZE_MAX: u64 = 256 << 20;
/// Two writes within one clock tick of the file system leave equal timestamps: a file read this
/// soon after its change is read again.
const TICK: Duration = Duration::from_millis(50);

/// The directory as of the last scan.
#[derive(Debug, Default)]
pub(super) struct Files {
    files: BTreeMap<OsString, FileState>,
}

/// What the next scan depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    /// Device and inode of the scanned directory; the path may lead to another one later.
    pub directory: Option<(u64, u64)>,
    /// A file was being written: its previous content applies.
    pub being_written: bool,
    /// A file changed so recently that a later change could go unnoticed.
    pub too_recent: bool,
}

#[derive(Debug, Default)]
struct FileState {
    /// `None`: read it in the next scan in any case.
    stamp: Option<Stamp>,
    content: Content,
}

/// Tells a changed file from an unchanged one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Unlike mtime, this cannot be set by a program.
    changed: (i64, i64),
}

/// The result of reading a file.
enum ReadResult {
    Content(Content, Stamp),
    /// The file changed while it was read.
    Changed,
    Missing,
}

impl Files {
    /// Updates the declarations from the directory. Changes nothing if it cannot be read.
    pub(super) fn scan(
        &mut self,
        directory: &Path,
        writing: &HashSet<OsString>,
        declarations: &mut Declarations,
    ) -> io::Result<Scan> {
        let metadata = fs::metadata(directory)?;
        let mut scan = Scan { directory: Some((metadata.dev(), metadata.ino())), ..Scan::default() };
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name();
            let Some(format) = format(&name) else { continue };
            if self.visit(&directory.join(&name), &name, format, writing, declarations, &mut scan) {
                found.insert(name);
            }
        }
        self.files.retain(|name, state| {
            let exists = found.contains(name);
            if !exists {
                declarations.replace(name, &state.content.declarations, &[]);
            }
            exists
        });
        Ok(scan)
    }

    /// Reads the file if it changed. Returns whether it exists.
    fn visit(
        &mut self,
        path: &Path,
        name: &OsStr,
        format: Format,
        writing: &HashSet<OsString>,
        declarations: &mut Declarations,
        scan: &mut Scan,
    ) -> bool {
        let state = self.files.get(name);
        if writing.contains(name) {
            scan.being_written = true;
            return state.is_some();
        }
        let stamp = fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata));
        if let Some(state) = state
            && state.stamp.is_some()
            && state.stamp == stamp
        {
            return true;
        }
        let (mut content, stamp) = match read(path, format) {
            Ok(ReadResult::Content(content, stamp)) => {
                let recent = stamp.is_recent();
                scan.too_recent |= recent;
                (content, (!recent).then_some(stamp))
            }
            Ok(ReadResult::Changed) => {
                scan.being_written = true;
                return state.is_some();
            }
            Ok(ReadResult::Missing) => return false,
            Err(error) => (Content::unreadable(format!("cannot read file: {error}")), None),
        };
        let state = self.files.entry(name.to_owned()).or_default();
        if content.incomplete {
            keep_hidden(&state.content.declarations, &mut content.declarations);
        }
        if state.content != content {
            declarations.replace(name, &state.content.declarations, &content.declarations);
        }
        *state = FileState { stamp, content };
        true
    }

    /// The problems of each file.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.files.iter().flat_map(|(name, state)| {
            let name = name.to_string_lossy();
            state.content.problems.iter().map(move |problem| Problem {
                subject: if problem.subject.is_empty() {
                    name.to_string()
                } else {
                    format!("{name}: {}", problem.subject)
                },
                message: problem.message.clone(),
            })
        })
    }
}

/// Objects missing from an incompletely parsed file may still be in it: keep them.
fn keep_hidden(before: &[(ObjectKey, Declaration)], now: &mut Vec<(ObjectKey, Declaration)>) {
    let shown: BTreeSet<_> = now.iter().map(|(key, _)| key.clone()).collect();
    let hidden = before.iter().map(|(key, _)| key).filter(|key| !shown.contains(key));
    now.extend(hidden.map(|key| (key.clone(), Declaration::Invalid)));
}

fn format(name: &OsStr) -> Option<Format> {
    // hidden files: versions of ConfigMap volumes, drafts of editors
    if name.as_bytes().starts_with(b".") {
        return None;
    }
    match Path::new(name).extension()?.to_str()? {
        "yaml" | "yml" => Some(Format::Yaml),
        "json" => Some(Format::Json),
        _ => None,
    }
}

fn read(path: &Path, format: Format) -> io::Result<ReadResult> {
    // checked before open: opening a pipe blocks until there is a writer
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(io::Error::other("not a regular file")),
        Ok(_) => {}
        // a dangling link exists, and is a problem
        Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
            return Ok(ReadResult::Missing);
        }
        Err(error) => return Err(error),
    }
    let mut file = File::open(path)?;
    let before = Stamp::of(&file.metadata()?);
    if before.size > SIZE_MAX {
        return Err(io::Error::other(format!("file has {} bytes; at most {SIZE_MAX} are read", before.size)));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(SIZE_MAX).read_to_end(&mut bytes)?;
    if Stamp::of(&file.metadata()?) != before {
        return Ok(ReadResult::Changed);
    }
    let content = match std::str::from_utf8(&bytes) {
        Ok(text) => parse(format, text),
        Err(error) => Content::unreadable(format!("not UTF-8: {error}")),
    };
    Ok(ReadResult::Content(content, before))
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn is_recent(&self) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let changed = Duration::new(seconds.max(0).unsigned_abs(), nanoseconds.unsigned_abs() as u32);
        SystemTime::now().duration_since(UNIX_EPOCH).is_ok_and(|now| now.abs_diff(changed) < TICK)
    }
}
