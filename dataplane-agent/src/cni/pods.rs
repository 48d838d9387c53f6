//! Records of pods on disk: one file per device, in the state directory.
//!
//! A record is written before anything is created for its pod, and removed after all of it is
//! removed, so that after a crash the next agent knows what to clean up. Files are written by
//! rename: complete or absent.
//!
//! There is no fsync, which would take most of the time of an ADD. A power failure loses only
//! records of pods that it ended, too. Records of an earlier boot are removed without being read,
//! because they may be incomplete.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use dataplane_cni::protocol::{Attachment, Bandwidth, Pod, PortMapping};
use dataplane_common::abi::MacAddr;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Directory of the records, in the state directory. It holds nothing else.
pub const DIRECTORY: &str = "pods";
/// File with the boot ID of the records.
const BOOT_ID: &str = "boot_id";
/// Boot ID of the running kernel.
const KERNEL_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const EXTENSION: &str = "json";
/// Suffix of a record that cannot be parsed.
const INVALID_SUFFIX: &str = "broken";
/// Suffix of a file that is being written.
const TEMPORARY_SUFFIX: &str = "tmp";

/// What is, or is about to be, created for an attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub attachment: Attachment,
    /// Name of the network configuration.
    pub network: String,
    pub netns: PathBuf,
    pub pod: Option<Pod>,
    /// Name of the host device, and of the record's file.
    pub device: String,
    /// MAC address inside the pod.
    #[serde(with = "mac")]
    pub mac: MacAddr,
    pub mtu: u32,
    pub addresses: Vec<IpAddr>,
    /// Sources that the pod may use besides its addresses.
    #[serde(default)]
    pub allowed_sources: Vec<IpNet>,
    /// Host ports of the pod.
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// Increases with every record.
    pub sequence: u64,
}

/// Why a record cannot be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("pod record {path} is invalid ({detail}); moved to {moved_to}")]
    Invalid { path: PathBuf, detail: String, moved_to: PathBuf },
}

/// The directory of records.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// Creates the directory if needed, and removes records of an earlier boot.
    pub fn open(state_dir: &Path) -> Result<Self, RecordError> {
        let path = Path::new(KERNEL_BOOT_ID);
        let boot = fs::read_to_string(path).map_err(io_error("read", path))?;
        Self::open_in(state_dir, &boot)
    }

    fn open_in(state_dir: &Path, boot: &str) -> Result<Self, RecordError> {
        let store = Self { directory: state_dir.join(DIRECTORY) };
        fs::create_dir_all(&store.directory).map_err(io_error("create", &store.directory))?;
        let path = store.directory.join(BOOT_ID);
        // an unreadable file counts as another boot
        if fs::read_to_string(&path).is_ok_and(|found| found == boot) {
            return Ok(store);
        }
        for path in store.files()? {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        write(&path, boot.as_bytes())?;
        Ok(store)
    }

    /// Returns the valid records, oldest first, and an error for each invalid one.
    pub fn load(&self) -> Result<(Vec<Record>, Vec<RecordError>), RecordError> {
        let (mut records, mut problems) = (Vec::new(), Vec::new());
        for path in self.files()? {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some(EXTENSION) => match read(&path) {
                    Ok(record) => records.push(record),
                    Err(problem) => problems.push(problem),
                },
                // the agent crashed while writing it, before it created anything for the pod
                Some(TEMPORARY_SUFFIX) => fs::remove_file(&path).map_err(io_error("remove", &path))?,
                _ => {}
            }
        }
        records.sort_by_key(|record| record.sequence);
        Ok((records, problems))
    }

    /// Writes or replaces the record of a device.
    pub fn save(&self, record: &Record) -> Result<(), RecordError> {
        let path = self.path(&record.device);
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::from);
        write(&path, &text.map_err(io_error("write", &path))?)
    }

    /// Removes the record of a device, if there is one.
    pub fn remove(&self, device: &str) -> Result<(), RecordError> {
        let path = self.path(device);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    fn path(&self, device: &str) -> PathBuf {
        self.directory.join(format!("{device}.{EXTENSION}"))
    }

    fn files(&self) -> Result<Vec<PathBuf>, RecordError> {
        let entries = fs::read_dir(&self.directory).map_err(io_error("read", &self.directory))?;
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>();
        paths.map_err(io_error("read", &self.directory))
    }
}

/// Replaces the file atomically.
fn write(path: &Path, text: &[u8]) -> Result<(), RecordError> {
    let temporary = with_suffix(path, TEMPORARY_SUFFIX);
    fs::write(&temporary, text).map_err(io_error("write", &temporary))?;
    fs::rename(&temporary, path).map_err(io_error("rename to", path))
}

fn read(path: &Path) -> Result<Record, RecordError> {
    let text = fs::read(path).map_err(io_error("read", path))?;
    let detail = match serde_json::from_slice::<Record>(&text) {
        Ok(record) if path.file_stem().is_some_and(|stem| *stem == *record.device) => return Ok(record),
        Ok(record) => format!("it names device {}", record.device),
        Err(error) => error.to_string(),
    };
    let moved_to = with_suffix(path, INVALID_SUFFIX);
    fs::rename(path, &moved_to).map_err(io_error("rename to", &moved_to))?;
    Err(RecordError::Invalid { path: path.to_owned(), detail, moved_to })
}

fn with_suffix(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io { operation, path, source }
}

/// MAC addresses in the usual notation, for serde.
mod mac {
    use dataplane_common::abi::MacAddr;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
    pub(super) fn serialize<S: Serializer>(mac: &MacAddr, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(mac)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MacAddr, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        bytes.map(MacAddr::new).ok_or_else(|| D::Error::custom(format!("{text:?} is not a MAC address")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(device: &str, sequence: u64) -> Record {
        Record {
            attachment: Attachment { container_id: "c1".to_owned(), ifname: "eth0".to_owned() },
            network: "pods".to_owned(),
            netns: "/run/netns/c1".into(),
            pod: Some(Pod { namespace: "shop".to_owned(), name: "web-0".to_owned(), uid: String::new() }),
            device: device.to_owned(),
            mac: MacAddr::new([0x0a, 0xda, 10, 1, 0, 5]),
            mtu: 1_450,
            addresses: vec!["10.1.0.5".parse().unwrap(), "fd00::5".parse().unwrap()],
            allowed_sources: vec!["10.9.0.0/16".parse().unwrap()],
            port_mappings: Vec::new(),
            bandwidth: Bandwidth::default(),
            sequence,
        }
    }

    #[test]
    fn records_are_read_back_in_the_order_they_were_written() {
        let state_dir = tempfile::tempdir().unwrap();
        let store = Store::open(state_dir.path()).unwrap();
        for (device, sequence) in [("dpc", 1), ("dpa", 2), ("dpb", 3)] {
            store.save(&record(device, sequence)).unwrap();
        }
        store.remove("dpa").unwrap();
        store.remove("dpa").unwrap();
        let (records, problems) = Store::open(state_dir.path()).unwrap().load().unwrap();
        assert_eq!(records, [record("dpc", 1), record("dpb", 3)]);
        assert!(problems.is_empty());
    }

    #[test]
    fn records_of_an_earlier_boot_are_removed_without_being_read() {
        let state_dir = tempfile::tempdir().unwrap();
        let store = Store::open_in(state_dir.path(), "one").unwrap();
        store.save(&record("dpa", 1)).unwrap();
        // a power failure can leave an empty file
        fs::write(state_dir.path().join("pods/dpb.json"), "").unwrap();
        let (records, problems) = Store::open_in(state_dir.path(), "two").unwrap().load().unwrap();
        assert!(records.is_empty() && problems.is_empty());
        store.save(&record("dpa", 1)).unwrap();
        assert_eq!(Store::open_in(state_dir.path(), "two").unwrap().load().unwrap().0.len(), 1);
    }

    #[test]
    fn invalid_record_is_reported_and_moved_and_the_others_are_read() {
        let state_dir = tempfile::tempdir().unwrap();
        let store = Store::open(state_dir.path()).unwrap();
        store.save(&record("dpa", 1)).unwrap();
        let pods = state_dir.path().join("pods");
        fs::write(pods.join("dpb.json"), "{\"attachment\":").unwrap();
        fs::copy(pods.join("dpa.json"), pods.join("dpc.json")).unwrap();
        fs::write(pods.join("dpd.json.tmp"), "").unwrap();
        let (records, problems) = store.load().unwrap();
        assert_eq!(records, [record("dpa", 1)]);
        let mut problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        problems.sort();
        assert!(problems[0].contains("dpb.json is invalid (EOF"), "{problems:?}");
        assert!(problems[1].contains("dpc.json is invalid (it names device dpa)"), "{problems:?}");
        assert!(pods.join("dpb.json.broken").exists() && !pods.join("dpd.json.tmp").exists());
        // reported once, not at every start
        assert!(store.load().unwrap().1.is_empty());
    }
}
