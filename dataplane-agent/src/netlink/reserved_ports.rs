//! Ports the kernel gives to no socket that asks for any (`net.ipv4.ip_local_reserved_ports`).
//!
//! Others reserve ports too, and the kernel knows only all of them. Which of them are ours is in a file of the run
//! directory, which a boot empties as it does the kernel's list: so the next agent, and `cleanup`, release ours and no others.

use std::{
    collections::BTreeSet,
    fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use super::sysctl::{self, SysctlChange, SysctlError};

const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";
/// The ports sockets are given.
const LOCAL: &str = "net/ipv4/ip_local_port_range";
/// In the run directory.
const FILE: &str = "reserved_ports";

/// Why ports are not reserved as they are to be.
#[derive(Debug, thiserror::Error)]
pub enum ReservedPortsError {
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("write {path}: {source}")]
    Record { path: PathBuf, source: io::Error },
}

/// Those of them that are ours.
#[derive(Debug)]
pub struct ReservedPorts {
    file: PathBuf,
    ours: BTreeSet<u16>,
}

impl ReservedPorts {
    /// Takes over what an earlier agent reserved.
    pub fn open(run_dir: &Path) -> Self {
        let file = file(run_dir);
        let ours = fs::read_to_string(&file).map(|text| parse(&text)).unwrap_or_default();
        Self { file, ours }
    }

    /// Reserves these ports too.
    pub fn add(&mut self, ports: &BTreeSet<u16>) -> Result<Option<SysctlChange>, ReservedPortsError> {
        self.set(&(&self.ours | ports))
    }

    /// Reserves these ports, and no longer any other one of ours. `None`: it was so already.
    pub fn set(&mut self, ports: &BTreeSet<u16>) -> Result<Option<SysctlChange>, ReservedPortsError> {
        let Some(list) = sysctl::get(RESERVED)? else { return Ok(None) };
        let (reserved, ours) = planned(&parse(&list), &self.ours, ports);
        // first: what is ours and reserved by nobody does no harm, what is reserved and nobody's stays for ever
        if ours != self.ours {
            let failed = |source| ReservedPortsError::Record { path: self.file.clone(), source };
            fs::write(&self.file, text(&ours)).map_err(failed)?;
        }
        let change = sysctl::set(RESERVED, &text(&reserved))?;
        self.ours = ours;
        Ok(change)
    }
}

/// The record of what is ours, there or not: for who removes it.
pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join(FILE)
}

/// The ports sockets are given that ask for any.
pub fn local_ports() -> Result<Option<RangeInclusive<u16>>, SysctlError> {
    let range = sysctl::get(LOCAL)?;
    Ok(range.and_then(|text| {
        let (first, last) = text.split_once(char::is_whitespace)?;
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    }))
}

/// The whole list and ours of it, if we reserve `wanted`. What others reserve is not ours, though we want it too.
fn planned(
    list: &BTreeSet<u16>,
    ours: &BTreeSet<u16>,
    wanted: &BTreeSet<u16>,
) -> (BTreeSet<u16>, BTreeSet<u16>) {
    let others = list - ours;
    (&others | wanted, wanted - &others)
}

/// As the kernel writes it: `1024,3000-4000`. What cannot be read is left out.
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
    fn a_list_is_written_sorted_and_nothing_twice() {
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
    fn what_others_reserve_stays_and_ours_goes_when_it_is_not_wanted() {
        for (list, ours, wanted, then, ours_then) in [
            ("", "", "61000-65535", "61000-65535", "61000-65535"),
            ("8080", "", "40000", "8080,40000", "40000"),
            ("8080,40000", "40000", "40001", "8080,40001", "40001"),
            ("8080,40000", "40000", "", "8080", ""),
            // the operator's, whoever else wants it
            ("40000", "", "40000", "40000", ""),
            // somebody wrote the list without ours
            ("8080", "40000", "40000", "8080,40000", "40000"),
            ("39999-40001", "40000", "", "39999,40001", ""),
        ] {
            let (list_then, ours_is) = planned(&parse(list), &parse(ours), &parse(wanted));
            assert_eq!((text(&list_then).as_str(), text(&ours_is).as_str()), (then, ours_then), "{list:?}");
        }
    }
}
