//! Kernel switches under `/proc/sys/net`, of the network namespace of the calling thread.
//!
//! Only what packets need to pass is set, only if it differs, and every change is returned so that it can be told.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

/// Where a container has the switches to move: its own `/proc/sys` is read-only unless it is privileged.
const IN_CONTAINERS: &str = "/host/proc/sys";

/// No value is longer: a list of every second port.
const LONGEST: usize = 256 << 10;

/// A switch that was moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysctlChange {
    /// Below `/proc/sys`, with slashes: device names may have dots.
    pub key: String,
    pub from: String,
    pub to: String,
}

/// Why a switch could not be read or moved.
#[derive(Debug, thiserror::Error)]
#[error("{operation} /proc/sys/{key}: {source}")]
pub struct SysctlError {
    pub operation: &'static str,
    pub key: String,
    pub source: io::Error,
}

/// The value of a switch; `None` if the kernel does not have it (IPv6 may be off, a device may be gone).
///
/// In one read: of a list the kernel says no more than fits into the first, and `read_to_string` begins with a small one.
pub fn get(key: &str) -> Result<Option<String>, SysctlError> {
    let mut value = vec![0; LONGEST];
    let read = File::open(path(key)).and_then(|mut file| file.read(&mut value));
    match read {
        Ok(length) => Ok(Some(String::from_utf8_lossy(&value[..length]).trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SysctlError { operation: "read", key: key.to_owned(), source }),
    }
}

/// Moves a switch unless it stands there already. `None`: nothing was changed (or there is no such switch).
pub fn set(key: &str, value: &str) -> Result<Option<SysctlChange>, SysctlError> {
    let Some(from) = get(key)? else { return Ok(None) };
    if from == value {
        return Ok(None);
    }
    // an empty list is an empty line: nothing at all is not even written
    write(key, &format!("{value}\n"))?;
    Ok(Some(SysctlChange { key: key.to_owned(), from, to: value.to_owned() }))
}

fn write(key: &str, value: &str) -> Result<(), SysctlError> {
    let written = match fs::write(path(key), value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => in_container(key, value, error),
        done => done,
    };
    written.map_err(|source| SysctlError { operation: "write", key: key.to_owned(), source })
}

/// By the other mount of the same file system, if there is one. The namespace is the calling thread's there too.
fn in_container(key: &str, value: &str, read_only: io::Error) -> io::Result<()> {
    match fs::write(Path::new(IN_CONTAINERS).join(key), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(read_only),
        done => done,
    }
}

/// What a node needs: it forwards both families, and still learns its own routes from router advertisements.
pub fn prepare_node(uplinks: &[&str]) -> Result<Vec<SysctlChange>, SysctlError> {
    let mut changes = Vec::new();
    for uplink in uplinks {
        // a router ignores advertisements unless told otherwise (2), which would cost the node its default route.
        // First, or the kernel forgets that route the moment forwarding is switched on.
        let key = format!("net/ipv6/conf/{uplink}/accept_ra");
        if get(&key)?.as_deref() == Some("1") {
            changes.extend(set(&key, "2")?);
        }
    }
    changes.extend(set("net/ipv4/ip_forward", "1")?);
    changes.extend(set("net/ipv6/conf/all/forwarding", "1")?);
    Ok(changes)
}

/// What a device of ours needs: replies to translated packets come from addresses the kernel would not route there
/// (of services; of the host itself, if a client asked a port of the node), and nobody on it is to be asked or told by neighbour discovery.
pub fn prepare_device(device: &str) -> Result<Vec<SysctlChange>, SysctlError> {
    let mut changes = Vec::new();
    for (key, value) in [
        (format!("net/ipv4/conf/{device}/rp_filter"), "0"),
        (format!("net/ipv4/conf/{device}/accept_local"), "1"),
        (format!("net/ipv4/conf/{device}/send_redirects"), "0"),
        (format!("net/ipv6/conf/{device}/accept_dad"), "0"),
        (format!("net/ipv6/conf/{device}/accept_ra"), "0"),
        // 1: no link-local address of its own
        (format!("net/ipv6/conf/{device}/addr_gen_mode"), "1"),
    ] {
        changes.extend(set(&key, value)?);
    }
    Ok(changes)
}

/// Settings of the operator that break the datapath, as sentences. They are left alone.
pub fn problems() -> Result<Vec<String>, SysctlError> {
    let mut problems = Vec::new();
    // the stricter of `all` and the device's counts (Documentation/networking/ip-sysctl.rst)
    if get("net/ipv4/conf/all/rp_filter")?.as_deref() == Some("1") {
        problems.push(
            "net.ipv4.conf.all.rp_filter is 1: replies of services to processes of this host are dropped as spoofed; \
             set it to 0 or 2"
                .to_owned(),
        );
    }
    if get("net/ipv6/conf/all/disable_ipv6")?.as_deref() == Some("1") {
        problems.push("net.ipv6.conf.all.disable_ipv6 is 1: pods have no IPv6".to_owned());
    }
    Ok(problems)
}

fn path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(key)
}
