//! A layer: files of a root file system as a compressed archive, reproducible byte for byte.
//!
//! The owner is root, paths are sorted, all files have the same time, and parent directories are
//! added.

use std::{collections::BTreeMap, io::Write as _};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use tar::{Builder, EntryType, Header};

use super::digest::Digest;

/// Files by their path, relative to the root of the file system.
#[derive(Debug, Default)]
pub(super) struct Files(BTreeMap<String, File>);

#[derive(Debug)]
struct File {
    mode: u32,
    content: Vec<u8>,
}

/// A layer, and the values that an image refers to it by.
pub(super) struct Layer {
    /// The compressed archive.
    pub(super) blob: Vec<u8>,
    /// Digest of the uncompressed archive.
    pub(super) diff_id: Digest,
    /// Size of the uncompressed archive in bytes.
    pub(super) unpacked: u64,
}

impl Files {
    /// Adds an executable file.
    pub(super) fn program(&mut self, path: &str, content: Vec<u8>) {
        self.add(path, 0o755, content);
    }

    /// Adds a file that is not executable.
    pub(super) fn text(&mut self, path: &str, content: impl Into<Vec<u8>>) {
        self.add(path, 0o644, content.into());
    }

    fn add(&mut self, path: &str, mode: u32, content: Vec<u8>) {
        let twice = self.0.insert(path.to_owned(), File { mode, content });
        assert!(twice.is_none() && !path.starts_with('/'), "{path} is added once, relative to the root");
    }

    /// The layer of these files, with modification time `seconds` after the epoch.
    pub(super) fn layer(&self, seconds: u64) -> Result<Layer> {
        let archive = self.archive(seconds).context("archive the files of the image")?;
        let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
        gzip.write_all(&archive)?;
        let blob = gzip.finish().context("compress the files of the image")?;
        Ok(Layer { blob, diff_id: Digest::of(&archive), unpacked: archive.len() as u64 })
    }

    fn archive(&self, seconds: u64) -> Result<Vec<u8>> {
        let mut archive = Builder::new(Vec::new());
        let mut last: Vec<String> = Vec::new();
        for (path, file) in &self.0 {
            let directories = ancestors(path);
            for directory in directories.iter().filter(|directory| !last.contains(directory)) {
                append(&mut archive, &format!("{directory}/"), EntryType::Directory, 0o755, &[], seconds)?;
            }
            last.extend(directories);
            append(&mut archive, path, EntryType::Regular, file.mode, &file.content, seconds)?;
        }
        Ok(archive.into_inner()?)
    }
}

/// Adds an entry that root owns.
pub(super) fn append(
    archive: &mut Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    mode: u32,
    content: &[u8],
    seconds: u64,
) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(seconds);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content).with_context(|| format!("add {path}"))
}

/// The parent directories: `usr`, `usr/share` for `usr/share/file`.
fn ancestors(path: &str) -> Vec<String> {
    path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    fn files() -> Files {
        let mut files = Files::default();
        files.text("usr/share/b", "text");
        files.program("agent", vec![1, 2, 3]);
        files.text("usr/share/a/c", "more");
        files
    }

    #[test]
    fn entries_are_sorted_and_owned_by_root_after_their_directories() {
        let layer = files().layer(1_700_000_000).unwrap();
        let mut archive = Vec::new();
        GzDecoder::new(layer.blob.as_slice()).read_to_end(&mut archive).unwrap();
        assert_eq!((Digest::of(&archive), archive.len() as u64), (layer.diff_id, layer.unpacked));
        let mut names = Vec::new();
        for entry in tar::Archive::new(archive.as_slice()).entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            assert_eq!(header.mtime().unwrap(), 1_700_000_000);
            names.push((entry.path().unwrap().display().to_string(), header.mode().unwrap()));
        }
        let expected = [
            ("agent", 0o755),
            ("usr/", 0o755),
            ("usr/share/", 0o755),
            ("usr/share/a/", 0o755),
            ("usr/share/a/c", 0o644),
            ("usr/share/b", 0o644),
        ];
        assert_eq!(names, expected.map(|(name, mode)| (name.to_owned(), mode)));
    }

    #[test]
    fn same_files_give_the_same_layer() {
        assert_eq!(files().layer(7).unwrap().blob, files().layer(7).unwrap().blob);
        assert_ne!(files().layer(7).unwrap().blob, files().layer(8).unwrap().blob);
    }
}
