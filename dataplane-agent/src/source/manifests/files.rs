//! The files of the directory: which there are, which changed, what they say.
//!
//! A scan costs a `stat` per file; only files whose stamp is another are read. Files that somebody is writing wait.

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
    claims::Claims,
    parse::{Claim, Content, Format, parse},
};
use crate::{source::Problem, state::ObjectKey};

/// More is a slip, not a manifest.
const SIZE_MAX: u64 = 256 << 20;
/// Two writes within the clock tick of the file system leave the same times: a file read this soon after its change is
/// read again.
const TICK: Duration = Duration::from_millis(50);

/// The directory, as last seen.
#[derive(Debug, Default)]
pub(super) struct Files {
    files: BTreeMap<OsString, Known>,
}

/// What a scan leaves open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    /// The directory that was read: another one may have taken its name since.
    pub directory: Option<(u64, u64)>,
    /// A file was being written: it counts with what it said before.
    pub unsettled: bool,
    /// A file changed so recently that a change after this scan could go unseen.
    pub too_fresh: bool,
}

#[derive(Debug, Default)]
struct Known {
    /// `None`: to be read at the next scan in any case.
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
    /// Unlike the other times, nobody can set it back.
    changed: (i64, i64),
}

/// What reading a file came to.
enum Reading {
    Said(Content, Stamp),
    /// It changed meanwhile.
    Torn,
    Gone,
}

impl Files {
    /// Brings the claims up to what the directory says. If it cannot be read, nothing changes.
    pub(super) fn scan(
        &mut self,
        directory: &Path,
        writing: &HashSet<OsString>,
        claims: &mut Claims,
    ) -> io::Result<Scan> {
        let metadata = fs::metadata(directory)?;
        let mut scan = Scan { directory: Some((metadata.dev(), metadata.ino())), ..Scan::default() };
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name();
            let Some(format) = format(&name) else { continue };
            if self.visit(&directory.join(&name), &name, format, writing, claims, &mut scan) {
                found.insert(name);
            }
        }
        self.files.retain(|name, known| {
            let there = found.contains(name);
            if !there {
                claims.replace(name, &known.content.claims, &[]);
            }
            there
        });
        Ok(scan)
    }

    /// Whether the file is there.
    fn visit(
        &mut self,
        path: &Path,
        name: &OsStr,
        format: Format,
        writing: &HashSet<OsString>,
        claims: &mut Claims,
        scan: &mut Scan,
    ) -> bool {
        let known = self.files.get(name);
        if writing.contains(name) {
            scan.unsettled = true;
            return known.is_some();
        }
        let stamp = fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata));
        if let Some(known) = known
            && known.stamp.is_some()
            && known.stamp == stamp
        {
            return true;
        }
        let (mut content, stamp) = match read(path, format) {
            Ok(Reading::Said(content, stamp)) => {
                let fresh = stamp.is_fresh();
                scan.too_fresh |= fresh;
                (content, (!fresh).then_some(stamp))
            }
            Ok(Reading::Torn) => {
                scan.unsettled = true;
                return known.is_some();
            }
            Ok(Reading::Gone) => return false,
            Err(error) => (Content::unreadable(format!("read: {error}")), None),
        };
        let known = self.files.entry(name.to_owned()).or_default();
        if content.opaque {
            keep(&known.content.claims, &mut content.claims);
        }
        if known.content != content {
            claims.replace(name, &known.content.claims, &content.claims);
        }
        *known = Known { stamp, content };
        true
    }

    /// What is wrong in each file.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.files.iter().flat_map(|(name, known)| {
            let name = name.to_string_lossy();
            known.content.complaints.iter().map(move |complaint| Problem {
                subject: if complaint.subject.is_empty() {
                    name.to_string()
                } else {
                    format!("{name}: {}", complaint.subject)
                },
                message: complaint.message.clone(),
            })
        })
    }
}

/// What an opaque file does not show may still be in it.
fn keep(before: &[(ObjectKey, Claim)], now: &mut Vec<(ObjectKey, Claim)>) {
    let shown: BTreeSet<_> = now.iter().map(|(key, _)| key.clone()).collect();
    let hidden = before.iter().map(|(key, _)| key).filter(|key| !shown.contains(key));
    now.extend(hidden.map(|key| (key.clone(), Claim::Broken)));
}

fn format(name: &OsStr) -> Option<Format> {
    // hidden: ConfigMap volumes keep their versions in such, editors their drafts
    if name.as_bytes().starts_with(b".") {
        return None;
    }
    match Path::new(name).extension()?.to_str()? {
        "yaml" | "yml" => Some(Format::Yaml),
        "json" => Some(Format::Json),
        _ => None,
    }
}

fn read(path: &Path, format: Format) -> io::Result<Reading> {
    // before it is opened: to open a pipe waits for its writer
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(io::Error::other("not a regular file")),
        Ok(_) => {}
        // a link that leads nowhere is there, and a problem
        Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
            return Ok(Reading::Gone);
        }
        Err(error) => return Err(error),
    }
    let mut file = File::open(path)?;
    let before = Stamp::of(&file.metadata()?);
    if before.size > SIZE_MAX {
        return Err(io::Error::other(format!("{} bytes are too many (at most {SIZE_MAX})", before.size)));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(SIZE_MAX).read_to_end(&mut bytes)?;
    if Stamp::of(&file.metadata()?) != before {
        return Ok(Reading::Torn);
    }
    let content = match std::str::from_utf8(&bytes) {
        Ok(text) => parse(format, text),
        Err(error) => Content::unreadable(format!("not UTF-8: {error}")),
    };
    Ok(Reading::Said(content, before))
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

    fn is_fresh(&self) -> bool {
        let (seconds, nanoseconds) = self.changed;
        let changed = Duration::new(seconds.max(0).unsigned_abs(), nanoseconds.unsigned_abs() as u32);
        SystemTime::now().duration_since(UNIX_EPOCH).is_ok_and(|now| now.abs_diff(changed) < TICK)
    }
}
