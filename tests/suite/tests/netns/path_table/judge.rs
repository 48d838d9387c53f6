//! What was heard against what the oracle says.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use comfy_table::Table;
use dataplane_oracle::{Protocol, Verdict};
use dataplane_testkit::traffic::report::Heard;

use super::{
    bed::Bed,
    cells::{Asker, Cell},
    known::{Mode, known},
};

/// Where somebody should speak, a slow machine gets time; where nobody should, the wait is the cost of the cell.
const SPEAKS_MS: u64 = 3_000;
const SILENT_MS: u64 = 400;

/// All cells that were asked.
#[derive(Default)]
pub(crate) struct Sheet {
    rows: Vec<Row>,
}

struct Row {
    cell: Cell,
    expected: String,
    seen: String,
    is_right: bool,
}

/// The sheet, and what was known before.
pub(crate) struct Judged {
    right: usize,
    wrong: Vec<Row>,
    /// Wrong cells by the reason they are known for.
    known: BTreeMap<&'static str, usize>,
    /// Reasons none of whose cells is wrong any more.
    mended: Vec<&'static str>,
}

/// Longest that an answer is waited for.
pub(crate) const fn patience_ms(expected: &Verdict) -> u64 {
    match expected {
        Verdict::Delivered(_) | Verdict::Rejected | Verdict::NotTranslated => SPEAKS_MS,
        Verdict::Dropped | Verdict::NoFrontend => SILENT_MS,
    }
}

/// How many must have answered before no more is asked.
pub(crate) fn servers(expected: &Verdict) -> usize {
    match expected {
        Verdict::Delivered(endpoints) => endpoints.len(),
        _ => 1,
    }
}

impl Sheet {
    pub(crate) fn add(&mut self, cell: Cell, expected: &Verdict, heard: &Heard, bed: &Bed) {
        let is_right = match bed.mode() {
            // its rules for what leaves the host have a third way to refuse: the packet is not taken
            Mode::KubeProxy
                if cell.asker == Asker::Host && cell.protocol != Protocol::Tcp && is_answerless(expected) =>
            {
                is_right(cell.protocol, expected, heard, bed) || is_not_permitted(heard)
            }
            _ => is_right(cell.protocol, expected, heard, bed),
        };
        self.rows.push(Row { cell, expected: wanted(expected, bed), seen: seen(heard), is_right });
    }

    /// Known ones apart. Of a sample nobody can say that a reason is mended.
    pub(crate) fn judge(self, mode: Mode, is_full: bool) -> Judged {
        let (mut right, mut wrong, mut counts) = (0, Vec::new(), BTreeMap::new());
        for row in self.rows {
            let reason = known(row.cell, mode);
            if let Some(reason) = reason {
                *counts.entry(reason).or_insert(0) += usize::from(!row.is_right);
            }
            if row.is_right {
                right += 1;
            } else if reason.is_none() {
                wrong.push(row);
            }
        }
        let mended = counts.iter().filter(|(_, wrong)| is_full && **wrong == 0).map(|(reason, _)| *reason);
        Judged { right, wrong, mended: mended.collect(), known: counts }
    }
}

impl Judged {
    pub(crate) fn summary(&self) -> String {
        let known: usize = self.known.values().sum();
        let all = self.right + self.wrong.len() + known;
        format!("{all} cells: {} right, {} wrong, {known} known to be wrong", self.right, self.wrong.len())
    }

    /// How many cells each reason covers that are wrong.
    pub(crate) fn known(&self) -> Vec<String> {
        self.known.iter().map(|(reason, count)| format!("{count} × {reason}")).collect()
    }

    /// The table of those that are wrong, if any are.
    pub(crate) fn wrong(&self) -> Option<String> {
        if self.wrong.is_empty() && self.mended.is_empty() {
            return None;
        }
        let mut table = Table::new();
        table.set_header(["cell", "expected", "seen"]);
        for row in &self.wrong {
            table.add_row([row.cell.to_string(), row.expected.clone(), row.seen.clone()]);
        }
        let mended = self
            .mended
            .iter()
            .map(|reason| format!("\nno longer wrong, and to be taken from the list: {reason}"));
        Some(format!("{table}{}", mended.collect::<String>()))
    }
}

/// Exactly those who may answer did, each of them saw who it should, and nothing else was heard.
fn is_right(protocol: Protocol, expected: &Verdict, heard: &Heard, bed: &Bed) -> bool {
    let Heard { answers, refused, aborted, silent, failed, .. } = heard;
    let answers: BTreeSet<(String, IpAddr)> = answers
        .iter()
        .flat_map(|(name, sources)| sources.keys().map(move |source| (name.clone(), *source)))
        .collect();
    let heard = (answers.is_empty(), *refused > 0, *aborted > 0, *silent > 0);
    failed.is_empty()
        && match expected {
            Verdict::Delivered(endpoints) => {
                let wanted = endpoints.iter().map(|(at, source)| (bed.name(at.ip()), *source)).collect();
                answers == wanted && heard == (false, false, false, false)
            }
            // an SCTP that has nobody there refuses in its own words
            Verdict::NotTranslated if protocol == Protocol::Sctp => heard == (true, false, true, false),
            Verdict::NotTranslated | Verdict::Rejected => heard == (true, true, false, false),
            Verdict::Dropped => heard == (true, false, false, true),
            Verdict::NoFrontend => answers.is_empty(),
        }
}

const fn is_answerless(expected: &Verdict) -> bool {
    matches!(expected, Verdict::Rejected | Verdict::Dropped)
}

fn is_not_permitted(heard: &Heard) -> bool {
    let Heard { answers, refused, aborted, silent, failed, .. } = heard;
    answers.is_empty() && refused + aborted + silent == 0 && failed.keys().eq(["not_permitted"])
}

fn wanted(expected: &Verdict, bed: &Bed) -> String {
    let Verdict::Delivered(endpoints) = expected else { return expected.to_string() };
    let each = endpoints.iter().map(|(at, source)| format!("{} seeing {source}", bed.name(at.ip())));
    each.collect::<Vec<_>>().join("\n")
}

fn seen(heard: &Heard) -> String {
    let Heard { answers, refused, aborted, silent, failed, .. } = heard;
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
