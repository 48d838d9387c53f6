//! Sysctls under `/proc/sys/net`, of the network namespace of the calling thread.
//!
//! Only what forwarding requires is set, and only if it differs. Every change is returned, so that
//! it can be logged.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use super::link::POD_DEVICE_PREFIX;

/// Where the agent's container mounts the host's `/proc/sys`: its own is read-only unless it is
/// privileged.
const HOST_PROC_SYS: &str = "/host/proc/sys";

/// Size of the read buffer. The longest value is a list of every second port.
const MAX_VALUE_BYTES: usize = 256 << 10;

/// A sysctl that was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysctlChange {
    /// Path below `/proc/sys`. With slashes, because device names may contain dots.
    pub key: String,
    pub from: String,
    pub to: String,
}

/// Why a sysctl could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{operation} /proc/sys/{key}: {source}")]
pub struct SysctlError {
    pub operation: &'static str,
    pub key: String,
    pub source: io::Error,
}

/// Reads a sysctl; `None` if it does not exist (IPv6 disabled, or the device does not exist).
///
/// With one `read`: the kernel returns of a list only what fits into the first one, and
/// `read_to_string` starts with a small buffer.
pub fn get(key: &str) -> Result<Option<String>, SysctlError> {
    let mut value = vec![0; MAX_VALUE_BYTES];
    let read = File::open(path(key)).and_then(|mut file| file.read(&mut value));
    match read {
        Ok(length) => Ok(Some(String::from_utf8_lossy(&value[..length]).trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SysctlError { operation: "read", key: key.to_owned(), source }),
    }
}

/// Writes a sysctl if its value differs. `None`: nothing changed, or the sysctl does not exist.
pub fn set(key: &str, value: &str) -> Result<Option<SysctlChange>, SysctlError> {
    let Some(from) = get(key)? else { return Ok(None) };
    if from == value {
        return Ok(None);
    }
    // an empty list needs the newline: a write of zero bytes has no effect
    write(key, &format!("{value}\n"))?;
    Ok(Some(SysctlChange { key: key.to_owned(), from, to: value.to_owned() }))
}

fn write(key: &str, value: &str) -> Result<(), SysctlError> {
    let written = match fs::write(path(key), value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            write_host_mount(key, value, error)
        }
        done => done,
    };
    written.map_err(|source| SysctlError { operation: "write", key: key.to_owned(), source })
}

/// Writes through the host's mount of `/proc/sys`, if there is one. It also acts on the calling
/// thread's namespace.
fn write_host_mount(key: &str, value: &str, read_only: io::Error) -> io::Result<()> {
    match fs::write(Path::new(HOST_PROC_SYS).join(key), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(read_only),
        done => done,
    }
}

/// Enables forwarding of both families, and moves source validation from `all` to the devices. The
/// node still accepts router advertisements. `overlay`: name of the overlay device.
pub fn prepare_node(uplinks: &[&str], overlay: &str) -> Result<Vec<SysctlChange>, SysctlError> {
    let mut changes = move_reverse_path_filter(overlay)?;
    for uplink in uplinks {
        // with forwarding enabled, accept_ra=1 means off; 2 keeps the node's default route. Set it
        // before forwarding, because the kernel removes that route when forwarding is enabled.
        let key = format!("net/ipv6/conf/{uplink}/accept_ra");
        if get(&key)?.as_deref() == Some("1") {
            changes.extend(set(&key, "2")?);
        }
    }
    changes.extend(set("net/ipv4/ip_forward", "1")?);
    changes.extend(set("net/ipv6/conf/all/forwarding", "1")?);
    Ok(changes)
}

/// Gives every device but pod devices and the overlay device at least the `rp_filter` of `all`, and
/// sets that to 0.
///
/// The kernel uses the maximum of `all` and the device's value
/// (Documentation/networking/ip-sysctl.rst), so nothing changes for these devices. On pod devices,
/// which have no IPv4 address, 1 and 2 both drop replies of services to processes of the host.
fn move_reverse_path_filter(overlay: &str) -> Result<Vec<SysctlChange>, SysctlError> {
    const ALL: &str = "net/ipv4/conf/all/rp_filter";
    let Some(all) = get(ALL)?.filter(|all| all != "0") else { return Ok(Vec::new()) };
    let mut changes = Vec::new();
    // with `default`, for devices to come
    for device in devices()? {
        if device == "all" || device == overlay || device.starts_with(POD_DEVICE_PREFIX) {
            continue;
        }
        let key = format!("net/ipv4/conf/{device}/rp_filter");
        if get(&key)?.is_some_and(|own| own < all) {
            changes.extend(set(&key, &all)?);
        }
    }
    changes.extend(set(ALL, "0")?);
    Ok(changes)
}

/// Names below `net/ipv4/conf`: the devices, `all` and `default`.
fn devices() -> Result<Vec<String>, SysctlError> {
    const KEY: &str = "net/ipv4/conf";
    let failed = |source| SysctlError { operation: "list", key: KEY.to_owned(), source };
    fs::read_dir(path(KEY))
        .map_err(failed)?
        .map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Sets the sysctls of a pod device or the overlay device: no source validation, because replies of
/// translated connections have source addresses that the kernel routes elsewhere (service and host
/// addresses), and no neighbour discovery.
pub fn prepare_device(device: &str) -> Result<Vec<SysctlChange>, SysctlError> {
    let mut changes = Vec::new();
    for (key, value) in [
        (format!("net/ipv4/conf/{device}/rp_filter"), "0"),
        (format!("net/ipv4/conf/{device}/accept_local"), "1"),
        (format!("net/ipv4/conf/{device}/send_redirects"), "0"),
        (format!("net/ipv6/conf/{device}/accept_dad"), "0"),
        (format!("net/ipv6/conf/{device}/accept_ra"), "0"),
        // 1: the kernel generates no link-local address
        (format!("net/ipv6/conf/{device}/addr_gen_mode"), "1"),
    ] {
        changes.extend(set(&key, value)?);
    }
    Ok(changes)
}

/// Sysctls of the operator that break the datapath, as sentences. They are not changed.
pub fn problems() -> Result<Vec<String>, SysctlError> {
    let mut problems = Vec::new();
    if get("net/ipv6/conf/all/disable_ipv6")?.as_deref() == Some("1") {
        problems.push(
            "net.ipv6.conf.all.disable_ipv6 is 1: pods have no IPv6; set it to 0 if they need it".to_owned(),
        );
    }
    Ok(problems)
}

fn path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(key)
}
