//! Figures of a run as SVG: rates, ratios with intervals, latencies, and single programs. They are
//! made of the JSON of a run, so that one can be drawn again.

mod chart;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use self::chart::{Chart, Line, Mark};
use crate::program::is_program_row;

/// The part of a report that the figures show.
#[derive(Debug, Deserialize)]
struct Run {
    rows: Vec<Row>,
}

#[derive(Debug, Deserialize)]
struct Row {
    name: String,
    params: Map<String, Value>,
    vs_peer: Option<Ratio>,
    vs_limit: Option<Ratio>,
    rates: BTreeMap<String, Rate>,
}

#[derive(Debug, Deserialize)]
struct Ratio {
    peer: String,
    median: f64,
    low: f64,
    high: f64,
}

#[derive(Debug, Deserialize)]
struct Rate {
    per_second: f64,
    p50_us: f64,
    /// Not in a run that was written down as a table.
    #[serde(default)]
    p99_us: Option<f64>,
}

/// A variant and its color (Okabe and Ito: also for the color-blind).
const COLORS: [(&str, [u8; 3]); 10] = [
    ("ours", [0xd5, 0x5e, 0x00]),
    ("raw", [0x00, 0x00, 0x00]),
    ("hosts", [0x5b, 0x4b, 0x8a]),
    ("empty", [0x80, 0x80, 0x80]),
    ("plain", [0x00, 0x9e, 0x73]),
    ("masquerade", [0xb8, 0x86, 0x00]),
    ("nftables", [0x00, 0x72, 0xb2]),
    ("iptables", [0x56, 0xb4, 0xe9]),
    ("katran", [0xcc, 0x79, 0xa7]),
    ("calico", [0x7a, 0x3e, 0x9d]),
];
/// Variants of the datapath in one row, by the parameter that tells them apart.
const OURS: [&str; 5] = ["xdp-dsr", "xdp", "tc", "packet", "ours"];

/// Draws all figures of a report that have data; returns the written files.
pub fn write(report: &Value, directory: &Path) -> Result<Vec<PathBuf>> {
    let run = Run::deserialize(report).context("cannot read the report of a run")?;
    let mut written = Vec::new();
    for (name, chart) in [
        ("bench-ratios", ratios(&run)),
        ("bench-rates", rates(&run)),
        ("bench-latencies", latencies(&run)),
        ("bench-programs", programs(&run)),
    ] {
        if chart.lines.is_empty() {
            continue;
        }
        let path = directory.join(format!("{name}.svg"));
        fs::write(&path, chart.draw()?).with_context(|| format!("cannot write {}", path.display()))?;
        written.push(path);
    }
    Ok(written)
}

fn ratios(run: &Run) -> Chart {
    let [peer, limit] = ["nftables", "ours"].map(color);
    let lines = traffic(run).filter_map(|row| {
        let marks =
            [(&row.vs_peer, peer), (&row.vs_limit, limit)].into_iter().filter_map(|(ratio, color)| {
                let Ratio { peer, median, low, high } = ratio.as_ref()?;
                let note = format!("{median:.2} × {peer}");
                Some(Mark { value: *median, range: Some((*low, *high)), color, note: Some(note) })
            });
        line(row, marks.collect())
    });
    Chart {
        title: "Ours against the best peer and the limit".to_owned(),
        axis: "ratio of operations per second, with 95 % interval (right of 1: ours is faster)".to_owned(),
        legend: vec![("against the best peer".to_owned(), peer), ("against the limit".to_owned(), limit)],
        reference: Some(1.0),
        lines: lines.collect(),
    }
}

fn rates(run: &Run) -> Chart {
    by_variant(run, "Operations per second", "operations per second (log scale)", |rate| {
        (rate.per_second, None)
    })
}

fn latencies(run: &Run) -> Chart {
    by_variant(
        run,
        "Latency of an operation",
        "µs, from the median (dot) to the 99th percentile (log scale)",
        |rate| (rate.p50_us, rate.p99_us.map(|p99| (rate.p50_us, p99.max(rate.p50_us)))),
    )
}

/// A chart of all variants of the rows with traffic.
fn by_variant(
    run: &Run,
    title: &str,
    axis: &str,
    value: impl Fn(&Rate) -> (f64, Option<(f64, f64)>),
) -> Chart {
    let lines: Vec<Line> = traffic(run)
        .filter_map(|row| {
            let marks = variants(row).map(|(variant, rate)| {
                let (value, range) = value(rate);
                let note = (variant == "ours").then(|| amount(value));
                Mark { value, range, color: color(variant), note }
            });
            line(row, marks.collect())
        })
        .collect();
    let used = COLORS
        .iter()
        .filter(|(name, _)| traffic(run).any(|row| variants(row).any(|(used, _)| used == *name)));
    Chart {
        title: title.to_owned(),
        axis: axis.to_owned(),
        legend: used.map(|(name, color)| ((*name).to_owned(), *color)).collect(),
        reference: None,
        lines,
    }
}

fn programs(run: &Run) -> Chart {
    let rows = || run.rows.iter().filter(|row| is_program_row(&row.name));
    let lines = rows().filter_map(|row| {
        let marks = variants(row).map(|(variant, rate)| {
            let nanos = 1e9 / rate.per_second;
            Mark {
                value: nanos.max(1.0),
                range: None,
                color: color(variant),
                note: Some(format!("{nanos:.0}")),
            }
        });
        line(row, marks.collect())
    });
    let used =
        COLORS.iter().filter(|(name, _)| rows().any(|row| variants(row).any(|(used, _)| used == *name)));
    Chart {
        title: "One program, without devices".to_owned(),
        axis: "ns per packet (log scale; less than 1 ns is drawn as 1)".to_owned(),
        legend: used.map(|(name, color)| ((*name).to_owned(), *color)).collect(),
        reference: None,
        lines: lines.collect(),
    }
}

fn traffic(run: &Run) -> impl Iterator<Item = &Row> {
    run.rows.iter().filter(|row| !is_program_row(&row.name))
}

/// The variant of the datapath that the row is about, then the others in the order of the colors.
fn variants(row: &Row) -> impl Iterator<Item = (&'static str, &Rate)> {
    let is = |key: &str, value: &str| row.params.get(key).is_some_and(|found| found == value);
    let ours = match () {
        () if is("way", "xdp with dsr") => "xdp-dsr",
        () if is("way", "xdp") => "xdp",
        () if is("way", "tc") => "tc",
        () if is("translation", "packet") => "packet",
        () => "ours",
    };
    debug_assert!(OURS.contains(&ours), "a variant of the datapath");
    let first = row.rates.get(ours).map(|rate| ("ours", rate));
    let others = COLORS.iter().filter(|(name, _)| *name != "ours");
    first.into_iter().chain(others.filter_map(|(name, _)| Some((*name, row.rates.get(*name)?))))
}

fn line(row: &Row, marks: Vec<Mark>) -> Option<Line> {
    let params: Vec<String> = row
        .params
        .iter()
        .map(|(key, value)| {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if key == "gso" {
                format!("GSO {value}")
            } else if value == "1" {
                format!("1 {}", key.trim_end_matches('s'))
            } else if ["connections", "services", "flows", "nodes"].contains(&key.as_str()) {
                format!("{value} {key}")
            } else {
                value
            }
        })
        .collect();
    let label = (row.name.clone(), params.join(", "));
    (!marks.is_empty()).then_some(Line { label, marks })
}

fn color(variant: &str) -> [u8; 3] {
    COLORS.iter().find(|(name, _)| *name == variant).map_or([0; 3], |(_, color)| *color)
}

/// Formats with a unit prefix and three digits.
fn amount(value: f64) -> String {
    match value {
        value if value >= 999_500.0 => format!("{:.2} M", value / 1e6),
        value if value >= 99_950.0 => format!("{:.0} k", value / 1e3),
        value if value >= 9_995.0 => format!("{:.1} k", value / 1e3),
        value if value >= 999.5 => format!("{:.2} k", value / 1e3),
        value if value >= 99.5 => format!("{value:.0}"),
        value => format!("{value:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run() -> Run {
        let rate = |per_second: f64| json!({"per_second": per_second, "p50_us": 1e6 / per_second, "p99_us": 2e6 / per_second});
        let report = json!({"rows": [{
            "name": "nodeport_udp", "params": {"flows": 1024, "way": "tc"},
            "vs_peer": {"peer": "nftables", "median": 1.6, "low": 1.5, "high": 1.7}, "vs_limit": null,
            "rates": {"xdp": rate(1e6), "tc": rate(4e5), "nftables": rate(2.5e5)},
        }]});
        serde_json::from_value(report).expect("a report")
    }

    #[test]
    fn row_has_the_variant_of_the_datapath_that_it_is_about() {
        let found: Vec<(&str, f64)> =
            variants(&run().rows[0]).map(|(name, rate)| (name, rate.per_second)).collect();
        assert_eq!(found, [("ours", 4e5), ("nftables", 2.5e5)]);
    }

    #[test]
    fn figures_have_rows_values_and_legend() {
        let run = run();
        for (chart, wanted) in [
            (ratios(&run), ["nodeport_udp", "1.60 × nftables", "against the limit"]),
            (rates(&run), ["1024 flows, tc", "400 k", "nftables"]),
            (latencies(&run), ["nodeport_udp", "2.5", "99th percentile"]),
        ] {
            let svg = chart.draw().expect("a figure");
            for text in wanted {
                assert!(svg.contains(text), "no {text:?} in {svg}");
            }
        }
        assert!(programs(&run).lines.is_empty());
    }

    #[test]
    fn amounts_have_three_digits() {
        let texts = [9.44, 123.4, 1_234.0, 12_345.0, 1_234_567.0].map(amount);
        assert_eq!(texts, ["9.4", "123", "1.23 k", "12.3 k", "1.23 M"]);
    }
}
