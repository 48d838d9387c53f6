//! Reserved local ports: the kernel does not choose them for sockets
//! (`net.ipv4.ip_local_reserved_ports`).
//!
//! The kernel's list also has ports that others reserved. A file in the run directory holds those
//! of the agent, so that the next agent and `cleanup` release only these. Both the file and the
//! kernel's list are empty after a boot.

use std::{
    collections::BTreeSet,
    fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use super::sysctl::{self, SysctlChange, SysctlError};

const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";
/// Ports that the kernel chooses from.
const LOCAL_PORT_RANGE: &str = "net/ipv4/ip_local_port_range";
/// File in the run directory.
const FILE: &str = "reserved_ports";

/// Why ports could not be reserved or released.
#[derive(Debug, thiserror::Error)]
pub enum ReservedPortsError {
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("write {path}: {source}")]
    Record { path: PathBuf, source: io::Error },
}

/// The ports that the agent reserved.
#[derive(Debug)]
pub struct ReservedPorts {
    file: PathBuf,
    own: BTreeSet<u16>,
}

impl ReservedPorts {
    /// Reads which ports an earlier agent reserved.
    pub fn open(run_dir: &Path) -> Self {
        let file = file(run_dir);
        let own = fs::read_to_string(&file).map(|text| parse(&text)).unwrap_or_default();
        Self { file, own }
    }

    /// Reserves more ports.
    pub fn add(&mut self, ports: &BTreeSet<u16>) -> Result<Option<SysctlChange>, ReservedPortsError> {
        self.set(&(&self.own | ports))
    }

    /// Reserves these ports, and releases all others of the agent. `None`: nothing changed.
    pub fn set(&mut self, ports: &BTreeSet<u16>) -> Result<Option<SysctlChange>, ReservedPortsError> {
        let Some(list) = sysctl::get(RESERVED)? else { return Ok(None) };
        let (reserved, own) = plan(&parse(&list), &self.own, ports);
        // the file first: after a crash, a port in the file that is not reserved does no harm, but
        // a reserved port that is not in the file would never be released
        if own != self.own {
            let failed = |source| ReservedPortsError::Record { path: self.file.clone(), source };
            fs::write(&self.file, text(&own)).map_err(failed)?;
        }
        let change = sysctl::set(RESERVED, &text(&reserved))?;
        self.own = own;
        Ok(change)
    }
}

/// Path of the file with the agent's ports. It need not exist.
pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join(FILE)
}

/// The range from which the kernel chooses local ports.
pub fn local_ports() -> Result<Option<RangeInclusive<u16>>, SysctlError> {
    let range = sysctl::get(LOCAL_PORT_RANGE)?;
    Ok(range.and_then(|text| {
        let (first, last) = text.split_once(char::is_whitespace)?;
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    }))
}

/// The new list of the kernel and the agent's part of it. A port that others reserved is not the
/// agent's, even if the agent needs it, too.
fn plan(
    list: &BTreeSet<u16>,
    own: &BTreeSet<u16>,
    desired: &BTreeSet<u16>,
) -> (BTreeSet<u16>, BTreeSet<u16>) {
    let others = list - own;
    (&others | desired, desired - &others)
}

/// Parses the kernel's format, `1024,3000-4000`. Invalid elements are ignored.
fn parse(list: &str) -> BTreeSet<u16> {
    let range = |text: &str| -> Option<RangeInclusive<u16>> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

fn text(ports: &BTreeSet<u16>) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for port in ports {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*port) => *last = *port,
            _ => ranges.push((*port, *port)),
        }
    }
    let text = |(first, last): (u16, u16)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.into_iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_is_written_sorted_and_without_duplicates() {
        for (list, expected) in [
            ("", ""),
            ("1024,3000-4000", "1024,3000-4000"),
            ("61000-65535", "61000-65535"),
            ("8080,8079,9148-9150,9151", "8079-8080,9148-9151"),
            ("1,60000-62000,61000-65535", "1,60000-65535"),
            (" 5 , x, 9-7, 70000,0-1\n", "0-1,5"),
        ] {
            assert_eq!(text(&parse(list)), expected, "{list:?}");
        }
    }

    #[test]
    fn ports_of_others_stay_reserved_and_unneeded_own_ports_are_released() {
        for (list, own, desired, list_after, own_after) in [
            ("", "", "61000-65535", "61000-65535", "61000-65535"),
            ("8080", "", "40000", "8080,40000", "40000"),
            ("8080,40000", "40000", "40001", "8080,40001", "40001"),
            ("8080,40000", "40000", "", "8080", ""),
            // reserved by the operator, and needed by the agent
            ("40000", "", "40000", "40000", ""),
            // another process overwrote the list without the agent's ports
            ("8080", "40000", "40000", "8080,40000", "40000"),
            ("39999-40001", "40000", "", "39999,40001", ""),
        ] {
            let (new_list, new_own) = plan(&parse(list), &parse(own), &parse(desired));
            let found = (text(&new_list), text(&new_own));
            assert_eq!((found.0.as_str(), found.1.as_str()), (list_after, own_after), "{list:?}");
        }
    }
}
