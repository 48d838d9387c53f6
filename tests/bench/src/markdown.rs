//! The report for people: a table on the terminal, and `docs/benchmarks.md` which keeps the last
//! run.

use std::fmt::{Arguments, Write as _};

use super::{
    plan::Variant,
    program::is_program_row,
    report::{Against, Ratio, Report, Row},
    scale::Scale,
    stats::Estimate,
};

/// Columns of the table of rates, as far as the run has them.
const COLUMNS: [Variant; 7] = [
    Variant::Raw,
    Variant::Empty,
    Variant::Hosts,
    Variant::Plain,
    Variant::Masquerade,
    Variant::Nftables,
    Variant::Iptables,
];

/// Returns the table of ratios, the result.
pub fn ratios(report: &Report) -> String {
    let mut text = String::from(
        "| row | ours, per second | against the best peer | of the limit | against fewest services |\n\
         |---|---:|---:|---:|---:|\n",
    );
    for row in traffic_rows(report) {
        let dataplane = row.dataplane.map_or_else(|| "not measured".to_owned(), thousands);
        let fewest = row.vs_fewest_services.map_or_else(String::new, |ratio| both(&ratio));
        line(
            &mut text,
            format_args!(
                "| {} | {dataplane} | {} | {} | {fewest} |",
                title(row),
                against(row.vs_peer.as_ref()),
                limits(row)
            ),
        );
    }
    for row in &report.rows {
        for (variant, failure) in &row.failures {
            line(&mut text, format_args!("\n{}: {variant} failed: {failure}", title(row)));
        }
    }
    text
}

/// Returns the table of median rates of all variants.
pub fn rates(report: &Report) -> String {
    let is_used =
        |column: &Variant| traffic_rows(report).any(|row| row.rates.contains_key(&column.to_string()));
    let columns: Vec<Variant> = COLUMNS.into_iter().filter(is_used).collect();
    let mut text = String::from("| row, operations per second (p50 µs) | ours |");
    for column in &columns {
        text.push_str(&format!(" {column} |"));
    }
    text.push_str("\n|---|---:|");
    text.push_str(&"---:|".repeat(columns.len()));
    text.push('\n');
    for row in traffic_rows(report) {
        let dataplane = row.variant.unwrap_or(Variant::Ours);
        text.push_str(&format!("| {} |", title(row)));
        for variant in std::iter::once(&dataplane).chain(&columns) {
            match row.rates.get(&variant.to_string()) {
                Some(rate) => {
                    text.push_str(&format!(" {} ({:.1}) |", thousands(rate.per_second), rate.p50_us));
                }
                None => text.push_str(" – |"),
            }
        }
        text.push('\n');
    }
    if let Some((row, overhead)) = traffic_rows(report).find_map(|row| Some((row, row.overhead_us?))) {
        line(
            &mut text,
            format_args!(
                "\n`{}` is per second of processor time. Making and counting a packet takes {overhead:.3} µs without a node;\n\
                 they are subtracted.",
                row.name
            ),
        );
    }
    text
}

/// Returns the table of program runs, in nanoseconds per packet.
pub fn program_runs(report: &Report) -> String {
    let mut text = String::new();
    for row in report.rows.iter().filter(|row| is_program_row(row.name)) {
        let nanos = |variant: &str| row.rates.get(variant).map(|rate| 1e9 / rate.per_second);
        let limit = row.vs_limit.as_ref();
        let limit_nanos = limit.and_then(|limit| nanos(&limit.baseline.to_string()));
        let peer = match (&row.vs_peer, row.peers_absent.as_slice()) {
            (Some(peer), _) => {
                format!("{}, {}", nanoseconds(nanos(&peer.baseline.to_string())), against(Some(peer)))
            }
            (None, absent) => {
                let names: Vec<String> = absent.iter().map(|peer| format!("{peer} absent")).collect();
                names.join(", ")
            }
        };
        let difference = nanos(&Variant::Ours.to_string()).zip(limit_nanos).map(|(ours, limit)| ours - limit);
        line(
            &mut text,
            format_args!(
                "| {} | {} | {} | {} | {} | {peer} |",
                title(row),
                nanoseconds(nanos(&Variant::Ours.to_string())),
                nanoseconds(limit_nanos),
                nanoseconds(difference),
                against(limit),
            ),
        );
    }
    if text.is_empty() {
        return "No program runs in this run.\n".to_owned();
    }
    format!(
        "| row, ns per packet | ours | limit | ours less limit | of the limit | peer |\n\
         |---|---:|---:|---:|---:|---:|\n{text}"
    )
}

fn traffic_rows(report: &Report) -> impl Iterator<Item = &Row> {
    report.rows.iter().filter(|row| !is_program_row(row.name))
}

fn nanoseconds(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.1}"))
}

/// Returns the machine and the noise of the run.
pub fn conditions(report: &Report) -> String {
    let noise = report.noise.map_or_else(|| "not measured".to_owned(), |noise| both(&noise));
    let verdict = if report.is_quiet() {
        "within the 2 % allowed"
    } else if report.is_quiet_at_median() {
        "**rates differ by more than the 2 % allowed: of this run, only the p50 ratios count**"
    } else {
        "**more than the 2 % allowed: this run is no result**"
    };
    format!(
        "- Machine: {}\n- Commit {}, {}; {} rounds of {} s per block\n- Time stolen by other guests: {:.1} %\n- The same \
         thing measured twice per round: {noise}, {verdict}\n- iptables is `{}`\n",
        report.machine.line(),
        report.machine.commit,
        report.machine.date,
        report.rounds,
        report.seconds_per_block,
        report.stolen * 100.0,
        report.machine.iptables
    )
}

/// Returns the table of the agent in large clusters.
pub fn scale(results: &[Scale]) -> String {
    let Some(first) = results.first() else { return "Not measured in this run.\n".to_owned() };
    let mut text = String::from(
        "| services × endpoints | ready after | RSS (of its program; peak) | tables | one EndpointSlice into the tables: p50, p99 at most | within 5 ms |\n\
         |---|---:|---:|---:|---:|---:|\n",
    );
    for scale in results {
        line(
            &mut text,
            format_args!(
                "| {} × {} | {:.1} s | {:.0} MiB ({:.0}; {:.0}) | {:.0} MiB | {} ms, {} ms | {:.1} % of {} |",
                thousands(scale.services.into()),
                scale.endpoints,
                scale.ready_seconds,
                scale.rss_mib,
                scale.program_mib,
                scale.peak_rss_mib,
                scale.tables_mib,
                scale.change_p50_ms,
                scale.change_p99_ms,
                scale.change_within_5_ms * 100.0,
                scale.changes,
            ),
        );
    }
    line(&mut text, format_args!("\nAPI server: {}.", first.api_server));
    text
}

/// Returns the content of `docs/benchmarks.md`.
pub fn document(report: &Report) -> String {
    format!(
        include_str!("benchmarks.md.in"),
        conditions = conditions(report),
        ratios = ratios(report),
        rates = rates(report),
        program_runs = program_runs(report),
        scale = scale(&report.scale)
    )
}

fn title(row: &Row) -> String {
    let params: Vec<String> = row.params.iter().map(|(key, value)| format!("{key} {value}")).collect();
    format!("`{}` {}", row.name, params.join(", ").replace('"', "")).trim_end().to_owned()
}

/// Formats the ratio to the limit, and to programs that only redirect.
fn limits(row: &Row) -> String {
    let limit = row.vs_limit.as_ref();
    let is_other = |other: &&Against| {
        other.baseline == Variant::Empty && limit.is_some_and(|limit| limit.baseline != Variant::Empty)
    };
    let empty = row.vs.iter().find(is_other).map(|empty| format!("; {}", against(Some(empty))));
    against(limit) + &empty.unwrap_or_default()
}

fn against(against: Option<&Against>) -> String {
    against
        .map_or_else(|| "–".to_owned(), |against| format!("{} × {}", both(&against.ratio), against.baseline))
}

/// Formats the ratio of rates and the ratio of median operations.
fn both(ratio: &Ratio) -> String {
    format!("{}, p50 {:.3}", interval(&ratio.rate), ratio.p50.median)
}

fn interval(ratio: &Estimate) -> String {
    format!("**{:.3}** ({:.3}–{:.3})", ratio.median, ratio.low, ratio.high)
}

/// Formats 12345 as `12 345`.
fn thousands(rate: f64) -> String {
    let digits = format!("{rate:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

fn line(text: &mut String, arguments: Arguments<'_>) {
    // writing to a string cannot fail
    let _written = writeln!(text, "{arguments}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_separated_by_spaces() {
        assert_eq!([9.6, 999.0, 1_000.0, 1_234_567.0].map(thousands), ["10", "999", "1 000", "1 234 567"]);
    }

    #[test]
    fn interval_has_median_and_bounds() {
        let ratio = Estimate { median: 1.234_5, low: 1.2, high: 1.25 };
        assert_eq!(interval(&ratio), "**1.234** (1.200–1.250)");
    }
}
