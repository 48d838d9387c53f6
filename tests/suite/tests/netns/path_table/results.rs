//! Compares the replies with the verdicts of the oracle.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use comfy_table::Table;
use dataplane_oracle::{Protocol, Verdict};
use dataplane_testkit::traffic::report::ProbeResult;

use super::{
    cells::{Cell, ClientKind},
    known_failures::{Mode, known_failure},
    testbed::Testbed,
};

/// Timeout where a reply is expected: long enough for a slow machine.
const REPLY_TIMEOUT_MS: u64 = 3_000;
/// Timeout where none is expected: every such cell takes this long.
const NO_REPLY_TIMEOUT_MS: u64 = 400;

/// The results of all cells.
#[derive(Default)]
pub(crate) struct Results {
    rows: Vec<Row>,
}

struct Row {
    cell: Cell,
    expected: String,
    seen: String,
    is_right: bool,
}

/// The results by kind: right, wrong, and known to be wrong.
pub(crate) struct Summary {
    right: usize,
    wrong: Vec<Row>,
    /// Number of known wrong cells by reason.
    known: BTreeMap<&'static str, usize>,
    /// Reasons none of whose cells is wrong any longer.
    fixed: Vec<&'static str>,
}

/// How long to wait for a reply.
pub(crate) const fn timeout_ms(expected: &Verdict) -> u64 {
    match expected {
        Verdict::Delivered(_) | Verdict::Rejected | Verdict::NotTranslated => REPLY_TIMEOUT_MS,
        Verdict::Dropped | Verdict::NoFrontend => NO_REPLY_TIMEOUT_MS,
    }
}

/// The number of servers after whose replies a probe ends.
pub(crate) fn servers(expected: &Verdict) -> usize {
    match expected {
        Verdict::Delivered(endpoints) => endpoints.len(),
        _ => 1,
    }
}

impl Results {
    pub(crate) fn add(&mut self, cell: Cell, expected: &Verdict, report: &ProbeResult, testbed: &Testbed) {
        let is_right = match testbed.mode() {
            // its rules in the OUTPUT chain can also make the send fail with EPERM
            Mode::KubeProxy
                if cell.client == ClientKind::Host
                    && cell.protocol != Protocol::Tcp
                    && is_answerless(expected) =>
            {
                is_right(cell.protocol, expected, report, testbed) || is_not_permitted(report)
            }
            _ => is_right(cell.protocol, expected, report, testbed),
        };
        self.rows.push(Row { cell, expected: expectation(expected, testbed), seen: seen(report), is_right });
    }

    /// Separates known failures. A sample cannot show that a reason no longer applies.
    pub(crate) fn summarize(self, mode: Mode, is_full: bool) -> Summary {
        let (mut right, mut wrong, mut counts) = (0, Vec::new(), BTreeMap::new());
        for row in self.rows {
            let reason = known_failure(row.cell, mode);
            if let Some(reason) = reason {
                *counts.entry(reason).or_insert(0) += usize::from(!row.is_right);
            }
            if row.is_right {
                right += 1;
            } else if reason.is_none() {
                wrong.push(row);
            }
        }
        let fixed = counts.iter().filter(|(_, wrong)| is_full && **wrong == 0).map(|(reason, _)| *reason);
        Summary { right, wrong, fixed: fixed.collect(), known: counts }
    }
}

impl Summary {
    pub(crate) fn counts(&self) -> String {
        let known: usize = self.known.values().sum();
        let all = self.right + self.wrong.len() + known;
        format!("{all} cells: {} right, {} wrong, {known} known to be wrong", self.right, self.wrong.len())
    }

    /// The number of wrong cells for each known reason.
    pub(crate) fn known(&self) -> Vec<String> {
        self.known.iter().map(|(reason, count)| format!("{count} × {reason}")).collect()
    }

    /// A table of the cells that are wrong, if any is.
    pub(crate) fn wrong(&self) -> Option<String> {
        if self.wrong.is_empty() && self.fixed.is_empty() {
            return None;
        }
        let mut table = Table::new();
        table.set_header(["cell", "expected", "seen"]);
        for row in &self.wrong {
            table.add_row([row.cell.to_string(), row.expected.clone(), row.seen.clone()]);
        }
        let fixed = self
            .fixed
            .iter()
            .map(|reason| format!("\nno longer wrong, remove it from known_failures.rs: {reason}"));
        Some(format!("{table}{}", fixed.collect::<String>()))
    }
}

/// Exactly the expected backends replied, each saw the expected source, and nothing else arrived.
fn is_right(protocol: Protocol, expected: &Verdict, report: &ProbeResult, testbed: &Testbed) -> bool {
    let ProbeResult { answers, refused, aborted, silent, failed, .. } = report;
    let answers: BTreeSet<(String, IpAddr)> = answers
        .iter()
        .flat_map(|(name, sources)| sources.keys().map(move |source| (name.clone(), *source)))
        .collect();
    let kinds = (answers.is_empty(), *refused > 0, *aborted > 0, *silent > 0);
    failed.is_empty()
        && match expected {
            Verdict::Delivered(endpoints) => {
                let expected =
                    endpoints.iter().map(|(at, source)| (testbed.name(at.ip()), *source)).collect();
                answers == expected && kinds == (false, false, false, false)
            }
            // a closed SCTP port replies with ABORT, not with an ICMP error
            Verdict::NotTranslated if protocol == Protocol::Sctp => kinds == (true, false, true, false),
            Verdict::NotTranslated => kinds == (true, true, false, false),
            // refusals are limited: the next request may get none
            Verdict::Rejected => answers.is_empty() && *refused > 0 && *aborted == 0,
            Verdict::Dropped => kinds == (true, false, false, true),
            Verdict::NoFrontend => answers.is_empty(),
        }
}

const fn is_answerless(expected: &Verdict) -> bool {
    matches!(expected, Verdict::Rejected | Verdict::Dropped)
}

/// Whether the client should have been refused and got no response at all, which the limit of
/// refusals explains.
pub(crate) fn is_unrefused(expected: &Verdict, report: &ProbeResult) -> bool {
    let ProbeResult { answers, refused, aborted, silent, failed, number: _ } = report;
    matches!(expected, Verdict::Rejected)
        && answers.is_empty()
        && refused + aborted == 0
        && *silent > 0
        && failed.is_empty()
}

fn is_not_permitted(report: &ProbeResult) -> bool {
    let ProbeResult { answers, refused, aborted, silent, failed, .. } = report;
    answers.is_empty() && refused + aborted + silent == 0 && failed.keys().eq(["not_permitted"])
}

fn expectation(expected: &Verdict, testbed: &Testbed) -> String {
    let Verdict::Delivered(endpoints) = expected else { return expected.to_string() };
    let each = endpoints.iter().map(|(at, source)| format!("{} seeing {source}", testbed.name(at.ip())));
    each.collect::<Vec<_>>().join("\n")
}

fn seen(report: &ProbeResult) -> String {
    let ProbeResult { answers, refused, aborted, silent, failed, .. } = report;
    let mut parts = Vec::new();
    for (name, sources) in answers {
        parts.extend(sources.iter().map(|(source, count)| format!("{name} seeing {source} ({count})")));
    }
    let counts = [("refused", *refused), ("aborted", *aborted), ("silent", *silent)];
    parts.extend(
        counts.into_iter().filter(|(_, count)| *count > 0).map(|(what, count)| format!("{what} ({count})")),
    );
    parts.extend(failed.iter().map(|(what, count)| format!("{what} ({count})")));
    parts.join("\n")
}
