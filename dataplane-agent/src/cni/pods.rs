//! Records of the pods, on disk: one file per device, in the state directory.
//!
//! A record is written before anything is made for its pod, and removed after all of it is gone, so that a crash of the
//! agent between two steps leaves something that says what to clean up. A file is whole or not there.
//!
//! Nothing is waited for until it is on the disk (it would be most of the time an ADD takes): what a loss of power
//! takes along speaks of pods that went with it. Records of an earlier boot are thrown away unread, whole or torn.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use dataplane_cni::protocol::{Attachment, Bandwidth, Pod, PortMapping};
use dataplane_common::abi::MacAddr;
use serde::{Deserialize, Serialize};

/// Below the state directory. Nothing else is in it.
pub const DIRECTORY: &str = "pods";
/// Says which boot the records are of.
const BOOT: &str = "boot_id";
/// Which boot this is.
const THIS_BOOT: &str = "/proc/sys/kernel/random/boot_id";
const EXTENSION: &str = "json";
/// Added to the name of a file that cannot be read.
const BROKEN: &str = "broken";
/// Added to the name of a file that is being written.
const UNFINISHED: &str = "tmp";

/// What was, or is going to be, made for an attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub attachment: Attachment,
    /// Name of the network configuration.
    pub network: String,
    pub netns: PathBuf,
    pub pod: Option<Pod>,
    /// Host's side; the name of the file too.
    pub device: String,
    /// Link address inside the pod.
    #[serde(with = "mac")]
    pub mac: MacAddr,
    pub mtu: u32,
    pub addresses: Vec<IpAddr>,
    /// Ports of the node that lead to it.
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// Grows from record to record.
    pub sequence: u64,
}

/// A record that cannot be written, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is no record of a pod ({detail}): kept aside as {aside}")]
    Broken { path: PathBuf, detail: String, aside: PathBuf },
}

/// The directory of records.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// Makes sure of the directory, and that all in it is of this boot.
    pub fn open(state_dir: &Path) -> Result<Self, RecordError> {
        let this_boot = Path::new(THIS_BOOT);
        let boot = fs::read_to_string(this_boot).map_err(failed("read", this_boot))?;
        Self::open_in(state_dir, &boot)
    }

    fn open_in(state_dir: &Path, boot: &str) -> Result<Self, RecordError> {
        let store = Self { directory: state_dir.join(DIRECTORY) };
        fs::create_dir_all(&store.directory).map_err(failed("create", &store.directory))?;
        let path = store.directory.join(BOOT);
        // one that cannot be read is none
        if fs::read_to_string(&path).is_ok_and(|found| found == boot) {
            return Ok(store);
        }
        for path in store.files()? {
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
        write(&path, boot.as_bytes())?;
        Ok(store)
    }

    /// Every record, oldest first, and what is wrong with the others.
    pub fn load(&self) -> Result<(Vec<Record>, Vec<RecordError>), RecordError> {
        let (mut records, mut problems) = (Vec::new(), Vec::new());
        for path in self.files()? {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some(EXTENSION) => match read(&path) {
                    Ok(record) => records.push(record),
                    Err(problem) => problems.push(problem),
                },
                // the agent died while it wrote this, so it has made nothing yet of what it says
                Some(UNFINISHED) => fs::remove_file(&path).map_err(failed("remove", &path))?,
                _ => {}
            }
        }
        records.sort_by_key(|record| record.sequence);
        Ok((records, problems))
    }

    /// Writes a record in place of the one of its device.
    pub fn save(&self, record: &Record) -> Result<(), RecordError> {
        let path = self.path(&record.device);
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::from);
        write(&path, &text.map_err(failed("write", &path))?)
    }

    /// Removes the record of a device, if there is one.
    pub fn remove(&self, device: &str) -> Result<(), RecordError> {
        let path = self.path(device);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    fn path(&self, device: &str) -> PathBuf {
        self.directory.join(format!("{device}.{EXTENSION}"))
    }

    fn files(&self) -> Result<Vec<PathBuf>, RecordError> {
        let entries = fs::read_dir(&self.directory).map_err(failed("read", &self.directory))?;
        let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>();
        paths.map_err(failed("read", &self.directory))
    }
}

/// All of it, or what was there before.
fn write(path: &Path, text: &[u8]) -> Result<(), RecordError> {
    let unfinished = beside(path, UNFINISHED);
    fs::write(&unfinished, text).map_err(failed("write", &unfinished))?;
    fs::rename(&unfinished, path).map_err(failed("rename to", path))
}

fn read(path: &Path) -> Result<Record, RecordError> {
    let text = fs::read(path).map_err(failed("read", path))?;
    let detail = match serde_json::from_slice::<Record>(&text) {
        Ok(record) if path.file_stem().is_some_and(|stem| *stem == *record.device) => return Ok(record),
        Ok(record) => format!("it is about device {}", record.device),
        Err(error) => error.to_string(),
    };
    let aside = beside(path, BROKEN);
    fs::rename(path, &aside).map_err(failed("rename to", &aside))?;
    Err(RecordError::Broken { path: path.to_owned(), detail, aside })
}

fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io { operation, path, source }
}

/// Link addresses as people write them.
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
        bytes.map(MacAddr::new).ok_or_else(|| D::Error::custom(format!("{text:?} is no link address")))
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
            port_mappings: Vec::new(),
            bandwidth: Bandwidth::default(),
            sequence,
        }
    }

    #[test]
    fn records_outlive_the_agent_in_the_order_they_were_made() {
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
    fn records_of_an_earlier_boot_are_thrown_away_unread() {
        let state_dir = tempfile::tempdir().unwrap();
        let store = Store::open_in(state_dir.path(), "one").unwrap();
        store.save(&record("dpa", 1)).unwrap();
        // what a loss of power makes of a file
        fs::write(state_dir.path().join("pods/dpb.json"), "").unwrap();
        let (records, problems) = Store::open_in(state_dir.path(), "two").unwrap().load().unwrap();
        assert!(records.is_empty() && problems.is_empty());
        store.save(&record("dpa", 1)).unwrap();
        assert_eq!(Store::open_in(state_dir.path(), "two").unwrap().load().unwrap().0.len(), 1);
    }

    #[test]
    fn a_broken_record_is_named_and_kept_aside_and_the_rest_is_read() {
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
        assert!(problems[0].contains("dpb.json is no record of a pod (EOF"), "{problems:?}");
        assert!(
            problems[1].contains("dpc.json is no record of a pod (it is about device dpa)"),
            "{problems:?}"
        );
        assert!(pods.join("dpb.json.broken").exists() && !pods.join("dpd.json.tmp").exists());
        // said once, not at every start
        assert!(store.load().unwrap().1.is_empty());
    }
}
