//! Names and words that were replaced do not come back.
//!
//! The lists have only what has no other use: identifiers, and words that plain technical English
//! does without. `docs/glossary.md` has the terms in use.

use std::path::Path;

use anyhow::Result;

use super::{Outcome, outcome, read, source};
use crate::workspace;

/// Whole words in code, comments, documents and configuration, and what to write in their place.
const WORDS: &[(&str, &str)] = &[
    ("AsNode", "on_miss::Masquerade"),
    ("NoteError", "DeletionQueueError"),
    ("ToBackend", "on_miss::SelectBackend"),
    ("Told", "ServiceFixture"),
    ("Wiring", "PodDatapath"),
    ("WiringError", "PodDatapathError"),
    ("WishError", "AnnotationError"),
    ("Wishes", "PodAnnotations"),
    ("bed", "testbed"),
    ("gives_way", "is_evictable"),
    ("hear", "receive, learn"),
    ("heard", "received, learned"),
    ("hears", "receives, learns"),
    ("is_nowhere", "is_unspecified"),
    ("is_ours", "bypasses_stack, is_member"),
    ("is_past", "tuple_reusable"),
    ("is_sealed", "is_intact"),
    ("lend", "with_scratch_released"),
    ("let_go", "take"),
    ("licence", "license"),
    ("licences", "licenses"),
    ("of_another", "addr_of_other_node"),
    ("open_gate", "mark_may_have_flows"),
    ("open_gates", "hinted_protocols"),
    ("patience", "timeout"),
    ("route_gates", "route_flow_hints"),
    ("seal", "row checksum"),
    ("seal_at", "checksum_for"),
    ("seals", "row checksums"),
    ("trouble", "last_error, problem"),
    ("unheard", "not received"),
    ("wishes", "annotations, requests"),
];

/// Beginnings of replaced names, and what to write in their place.
const PREFIXES: &[(&str, &str)] = &[("mend_", "update_… or adjust_…"), ("tell_", "publish_…")];

/// Names that types, traits and functions below a path do not have, and what to call them.
const DECLARED: &[(&str, &[(&str, &str)])] = &[
    ("dataplane-common/src", DATAPATH),
    ("dataplane-ebpf/src", DATAPATH),
    ("dataplane-agent/src", AGENT),
    ("dataplane-cni/src", AGENT),
];

const DATAPATH: &[(&str, &str)] = &[
    ("Answer", "PackedResult"),
    ("Arrived", "Inbound"),
    ("Asks", "FrontendQuery"),
    ("From", "Origin"),
    ("Gates", "FlowHints"),
    ("Into", "DeliverVia"),
    ("Known", "on_miss::Pass"),
    ("Place", "Hook"),
    ("Purpose", "NewFlow"),
    ("Way", "NextHop"),
    ("Work", "Scratch"),
    ("account", "adjust_skb_csum"),
    ("admit", "reclaim_slot"),
    ("arrive", "resolve_inbound"),
    ("drive", "run_xdp or run_tc"),
    ("holds", "reorders"),
];

const AGENT: &[(&str, &str)] = &[
    ("Board", "NodeProblems"),
    ("Book", "RangeLedger"),
    ("Contact", "FailoverStats"),
    ("Counted", "InstrumentedTable"),
    ("Figures", "AllocatorMetrics"),
    ("Heard", "WatchEvent"),
    ("Hub", "Deduplicator"),
    ("KnownBy", "PrimaryIps"),
    ("Live", "DatapathReader"),
    ("Loaded", "LoadedPrograms"),
    ("Nearest", "TopologyScope"),
    ("News", "a name with `dirty`"),
    ("Notes", "DeletionQueue"),
    ("Programming", "ProgrammingLatency"),
    ("Running", "NodeDatapath or SourceHandle"),
    ("Setup", "NodeNetworkPlan"),
    ("Site", "NodeContext"),
    ("Turns", "KeyedMutex"),
    ("Usable", "EligibleEndpoints"),
    ("Waiting", "PendingPodLookups"),
    ("look", "poll"),
];

/// Ends of file names that were replaced.
const FILES: &[(&str, &str)] = &[
    ("/board.rs", "problems.rs"),
    ("/book.rs", "ledger.rs"),
    ("/counted.rs", "instrumented.rs"),
    ("/figures.rs", "metrics.rs"),
    ("/gone.rs", "pending_deletes.rs"),
    ("/held.rs", "reorder.rs"),
    ("/hub.rs", "deduplicator.rs"),
    ("/turns.rs", "keyed_mutex.rs"),
    ("/wiring.rs", "datapath.rs"),
    ("/wishes.rs", "annotations.rs"),
    ("reconcile/kernel.rs", "kernel_routes.rs"),
];

/// Where a word may stand: path, word (or `*`), and why.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("CHANGELOG.md", "*", "says what a name was before"),
    ("xtask/src/lint/words.rs", "*", "has the lists"),
    ("Cargo.lock", "*", "has names of other projects"),
];

pub(super) fn check() -> Result<Outcome> {
    let mut found = Vec::new();
    for extension in ["rs", "md", "toml", "yaml", "yml", "sh"] {
        for (file, text) in read(extension)? {
            found.extend(words(&file, &text));
            if extension == "rs" {
                found.extend(declarations(&file, &text));
            }
        }
    }
    for file in workspace::files("rs")? {
        found.extend(file_names(&file));
    }
    outcome("replaced words are back", &found)
}

fn is_exempt(file: &Path, word: &str) -> bool {
    EXCEPTIONS.iter().any(|(path, of, _)| file.starts_with(path) && (*of == "*" || *of == word))
}

fn words(file: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for word in line.split(|c: char| !c.is_alphanumeric() && c != '_') {
            let known = WORDS.binary_search_by_key(&word, |(old, _)| old).map(|at| WORDS[at].1);
            let prefix = || PREFIXES.iter().find(|(prefix, _)| word.starts_with(prefix));
            if let Some(better) = known.ok().or_else(|| prefix().map(|(_, better)| *better))
                && !is_exempt(file, word)
            {
                found.push(format!("{}:{}: {word}; write {better}", file.display(), index + 1));
            }
        }
    }
    found
}

fn declarations(file: &Path, text: &str) -> Vec<String> {
    let lists = DECLARED.iter().filter(|(path, _)| file.starts_with(path));
    let old: Vec<_> =
        lists.flat_map(|(_, names)| *names).filter(|(name, _)| !is_exempt(file, name)).collect();
    let mut found = Vec::new();
    for (index, line) in source::lines(text).iter().enumerate() {
        let mut tokens =
            line.code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|t| !t.is_empty());
        while let Some(token) = tokens.next() {
            if !["struct", "enum", "union", "trait", "type", "fn"].contains(&token) {
                continue;
            }
            let Some(name) = tokens.next() else { break };
            if let Some((_, better)) = old.iter().find(|(old, _)| *old == name) {
                found.push(format!("{}:{}: {token} {name}; call it {better}", file.display(), index + 1));
            }
        }
    }
    found
}

fn file_names(file: &Path) -> Option<String> {
    let name = file.to_string_lossy();
    let (_, better) = FILES.iter().find(|(old, _)| name.ends_with(old))?;
    Some(format!("{name}:1: the file's name was replaced; call it {better}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sorted_for_the_search() {
        assert!(WORDS.is_sorted_by_key(|(word, _)| word));
    }

    #[test]
    fn replaced_words_are_reported_as_whole_words() {
        let file = Path::new("docs/a.md");
        assert_eq!(
            words(file, "\nit calls `open_gate`\n"),
            ["docs/a.md:2: open_gate; write mark_may_have_flows"]
        );
        assert_eq!(words(file, "mend_sum"), ["docs/a.md:1: mend_sum; write update_… or adjust_…"]);
        assert!(words(file, "reopen_gates, amend_sum, shear, Wish, sealed\n").is_empty());
        assert!(words(Path::new("CHANGELOG.md"), "`open_gate` is `mark_may_have_flows`\n").is_empty());
    }

    #[test]
    fn replaced_names_are_reported_where_they_are_declared() {
        let file = Path::new("dataplane-agent/src/app/a.rs");
        assert_eq!(
            declarations(file, "// struct Book\npub(crate) struct Book {\n"),
            ["dataplane-agent/src/app/a.rs:2: struct Book; call it RangeLedger"]
        );
        assert!(declarations(file, "struct Bookshelf;\nmatch phase { Running => {} }\n").is_empty());
        assert!(declarations(Path::new("xtask/src/a.rs"), "struct Book;\n").is_empty());
    }

    #[test]
    fn replaced_file_names_are_reported() {
        assert!(file_names(Path::new("dataplane-cni/src/gone.rs")).is_some());
        assert!(file_names(Path::new("dataplane-cni/src/bygone.rs")).is_none());
    }
}
