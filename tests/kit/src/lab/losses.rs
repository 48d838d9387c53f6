//! Counters of packets that the kernel lost or sent again. They explain losses that no counter of
//! ours shows.

use std::fmt::Write as _;

use anyhow::Result;

use super::netns::Namespace;

/// Parts of the names of counters (net/ipv4/proc.c, net/ipv6/proc.c, net/sctp/proc.c) that increase
/// when a packet is lost or sent again.
const LOSS_COUNTERS: [&str; 18] = [
    "AddrErrors",
    "Blackhole",
    "Checksum",
    "Csum",
    "Discard",
    "Drop",
    "Fail",
    "Filter",
    "HdrErrors",
    "InErrors",
    "InErrs",
    "NoPorts",
    "NoRoutes",
    "OutOfBlue",
    "Overflow",
    "Rcvbuf",
    "Retrans",
    "Sndbuf",
];

/// Non-zero counters of all namespaces whose names begin with `prefix`, and of the neighbour
/// tables, which are global.
pub(super) fn losses(prefix: &str) -> String {
    let mut text = String::new();
    let names = Namespace::all_named(prefix).unwrap_or_default();
    for name in &names {
        let counted = Namespace::open(name).and_then(|namespace| of_namespace(&namespace));
        match counted {
            Ok(counters) if counters.is_empty() => {}
            Ok(counters) => {
                let _written = writeln!(text, "{name}: {}", counters.join(", "));
            }
            Err(error) => {
                let _written = writeln!(text, "{name}: {error:#}");
            }
        }
    }
    let any = names.first().and_then(|name| Namespace::open(name).ok());
    for (what, file) in
        [("IPv4 neighbours", "/proc/net/stat/arp_cache"), ("IPv6 neighbours", "/proc/net/stat/ndisc_cache")]
    {
        let read = any.as_ref().and_then(|namespace| namespace.read_proc(file).ok());
        let counters = read.map(|text| neighbours(&text)).unwrap_or_default();
        if !counters.is_empty() {
            let _written = writeln!(text, "{what}: {}", counters.join(", "));
        }
    }
    text
}

fn of_namespace(namespace: &Namespace) -> Result<Vec<String>> {
    let mut counters = Vec::new();
    // these are missing without SCTP or IPv6
    for file in ["/proc/net/snmp", "/proc/net/netstat"] {
        counters.extend(in_pairs_of_lines(&namespace.read_proc(file)?));
    }
    for file in ["/proc/net/snmp6", "/proc/net/sctp/snmp"] {
        counters.extend(in_lines(&namespace.read_proc(file).unwrap_or_default()));
    }
    counters.extend(of_devices(&namespace.read_proc("/proc/net/dev")?));
    Ok(counters)
}

/// Parses pairs of lines, one with names and one with values, into group, name and value.
pub(super) fn pairs_of_lines(text: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    let mut lines = text.lines().filter_map(|line| line.split_once(": "));
    let pairs = std::iter::from_fn(move || Some((lines.next()?, lines.next()?)));
    pairs.flat_map(|((group, names), (_, values))| {
        names.split(' ').zip(values.split(' ')).map(move |(name, value)| (group, name, value))
    })
}

fn in_pairs_of_lines(text: &str) -> Vec<String> {
    pairs_of_lines(text)
        .filter_map(|(group, name, value)| loss_counter(&format!("{group}{name}"), value))
        .collect()
}

/// Parses lines of a name and a value.
fn in_lines(text: &str) -> Vec<String> {
    let pairs = text.lines().filter_map(|line| line.split_once(char::is_whitespace));
    pairs.filter_map(|(name, value)| loss_counter(name, value.trim())).collect()
}

fn loss_counter(name: &str, value: &str) -> Option<String> {
    let is_loss = LOSS_COUNTERS.iter().any(|part| name.contains(part));
    (is_loss && value != "0").then(|| format!("{name} {value}"))
}

/// Errors and drops of devices (net/core/net-procfs.c).
fn of_devices(text: &str) -> Vec<String> {
    let mut counters = Vec::new();
    for line in text.lines() {
        let Some((device, values)) = line.split_once(':') else { continue };
        let values: Vec<&str> = values.split_whitespace().collect();
        let columns = [("rx_errors", 2), ("rx_dropped", 3), ("tx_errors", 10), ("tx_dropped", 11)];
        for (what, column) in columns {
            if let Some(value) = values.get(column).filter(|value| **value != "0") {
                counters.push(format!("{} {what} {value}", device.trim()));
            }
        }
    }
    counters
}

/// Failure counters of a neighbour table, summed over CPUs; hexadecimal in the file
/// (net/core/neighbour.c).
fn neighbours(text: &str) -> Vec<String> {
    let mut lines = text.lines().map(str::split_whitespace);
    let names: Vec<&str> = lines.next().into_iter().flatten().collect();
    let rows: Vec<Vec<u64>> = lines
        .map(|line| line.map(|value| u64::from_str_radix(value, 16).unwrap_or_default()).collect())
        .collect();
    let sum = |column| rows.iter().filter_map(|row: &Vec<u64>| row.get(column)).sum::<u64>();
    let columns = names.iter().enumerate().map(|(column, name)| (*name, sum(column)));
    let losses = columns.filter(|(name, sum)| {
        ["res_failed", "unresolved_discards", "table_fulls", "forced_gc_runs"].contains(name) && *sum > 0
    });
    losses.map(|(name, sum)| format!("{name} {sum}")).collect()
}

#[cfg(test)]
mod tests {
    use super::{in_lines, in_pairs_of_lines, neighbours, of_devices};

    #[test]
    fn non_zero_loss_counters_are_listed() {
        let pairs = "Udp: InDatagrams NoPorts InErrors RcvbufErrors\nUdp: 7 0 2 2\n";
        assert_eq!(in_pairs_of_lines(pairs), ["UdpInErrors 2", "UdpRcvbufErrors 2"]);
        let lines = "SctpChecksumErrors              \t1\nSctpOutOfBlues\t0\nSctpAborteds\t3\n";
        assert_eq!(in_lines(lines), ["SctpChecksumErrors 1"]);
        let devices =
            "Inter-|   Receive  |  Transmit\n face |bytes\n  eth0: 9 8 0 3 0 0 0 0 7 6 0 5 0 0 0 0\n";
        assert_eq!(of_devices(devices), ["eth0 rx_dropped 3", "eth0 tx_dropped 5"]);
        let table = "entries  res_failed unresolved_discards\n00000002 0000000f 00000000\n00000002 00000011 00000000\n";
        assert_eq!(neighbours(table), ["res_failed 32"]);
    }
}
