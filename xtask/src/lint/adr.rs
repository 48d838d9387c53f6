//! Every decision record says whether it holds and since when, and is listed.
//!
//! A record is a file `docs/adr/NNNN-title.md`. Below its title it has a line `- Status: …` (one of
//! [`STATUSES`]) and a line `- Date: YYYY-MM-DD`; `docs/adr/README.md` links to it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::{Outcome, outcome, read};
use crate::workspace;

const DIRECTORY: &str = "docs/adr";
const STATUSES: [&str; 4] = ["Proposed", "Accepted", "Deprecated", "Superseded by "];

pub(super) fn check() -> Result<Outcome> {
    let index = workspace::root().join(DIRECTORY).join("README.md");
    let index = fs::read_to_string(&index).with_context(|| format!("read {}", index.display()))?;
    let mut found = Vec::new();
    for (file, text) in read("md")? {
        let is_record = file.file_name().is_some_and(|name| name != "README.md");
        if file.starts_with(DIRECTORY) && is_record {
            found.extend(faults(&file, &text, &index));
        }
    }
    outcome("decision records are incomplete", &found)
}

fn faults(file: &Path, text: &str, index: &str) -> Vec<String> {
    let at = file.display();
    let mut found = Vec::new();
    match field(text, "Status") {
        None => {
            found.push(format!("{at}:2: no status; add `- Status: Accepted` (or another) below the title"));
        }
        Some((number, status)) if !STATUSES.iter().any(|known| status.starts_with(known)) => {
            let known = STATUSES.map(str::trim).join(", ");
            found.push(format!("{at}:{number}: the status {status:?} is unknown; use one of {known}"));
        }
        Some(_) => {}
    }
    match field(text, "Date") {
        None => found.push(format!("{at}:2: no date; add `- Date: YYYY-MM-DD` below the title")),
        Some((number, date)) if !is_date(date) => {
            found.push(format!("{at}:{number}: {date:?} is not a date; write it as YYYY-MM-DD"));
        }
        Some(_) => {}
    }
    let name = file.file_name().unwrap_or_default().display();
    if !index.contains(&format!("({name})")) {
        found.push(format!("{at}:1: not listed; add a row to {DIRECTORY}/README.md"));
    }
    found
}

/// Line number and value of `- name: value` between the title and the text.
fn field<'a>(text: &'a str, name: &str) -> Option<(usize, &'a str)> {
    text.lines()
        .enumerate()
        .skip(1)
        .take_while(|(_, line)| line.trim().is_empty() || line.starts_with("- "))
        .find_map(|(index, line)| {
            let value = line.strip_prefix("- ")?.strip_prefix(name)?.strip_prefix(':')?;
            Some((index + 1, value.trim()))
        })
}

fn is_date(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let is_number =
        |part: &&str, length| part.len() == length && part.bytes().all(|byte| byte.is_ascii_digit());
    matches!(&parts[..], [year, month, day] if is_number(year, 4) && is_number(month, 2) && is_number(day, 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "| [0001](0001-a.md) | A |\n";

    fn check(name: &str, text: &str) -> Vec<String> {
        faults(&Path::new(DIRECTORY).join(name), text, INDEX)
    }

    #[test]
    fn a_complete_record_has_no_faults() {
        let text = "# 0001: A\n\n- Status: Accepted\n- Date: 2026-11-28\n\nText\n";
        assert!(check("0001-a.md", text).is_empty());
        let text = "# 0001: A\n\n- Status: Superseded by [0002](0002-b.md)\n- Date: 2026-11-28\n";
        assert!(check("0001-a.md", text).is_empty());
    }

    #[test]
    fn what_a_record_lacks_is_reported() {
        let found = check("0002-b.md", "# 0002: B\n\nText\n\n- Status: Accepted\n");
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains(":2: no status") && found[1].contains(":2: no date"), "{found:?}");
        assert!(found[2].contains(":1: not listed"), "{found:?}");
        let found = check("0001-a.md", "# 0001: A\n\n- Status: Done\n- Date: 28.11.2026\n");
        assert!(found[0].contains(":3: the status \"Done\" is unknown"), "{found:?}");
        assert!(found[1].contains(":4: \"28.11.2026\" is not a date"), "{found:?}");
    }
}
