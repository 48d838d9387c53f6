//! Which module may use what: the boundaries that a reader relies on, checked by searching for
//! words.

use std::path::Path;

use anyhow::Result;

use super::{Outcome, outcome, read, read_file};
use crate::workspace;

// Where things are. A path that does not exist is reported, so that a rule does not end with a
// renamed file.
const AGENT: &str = "dataplane-agent/src";
const AGENT_ALLOCATE: &str = "dataplane-agent/src/allocate";
const AGENT_EVENT_RECORDER: &str = "dataplane-agent/src/event_recorder.rs";
const AGENT_CLUSTER: &str = "dataplane-agent/src/cluster";
const AGENT_COMPILE: &str = "dataplane-agent/src/compile";
const AGENT_DATAPATH: &str = "dataplane-agent/src/datapath";
const AGENT_LIFECYCLE: &str = "dataplane-agent/src/lifecycle";
const AGENT_NETLINK: &str = "dataplane-agent/src/netlink";
const AGENT_SOURCE: &str = "dataplane-agent/src/source";
const CNI: &str = "dataplane-cni";
const EBPF: &str = "dataplane-ebpf/src";
const EBPF_MAPS: &str = "dataplane-ebpf/src/maps.rs";
const EBPF_FRAME: &str = "dataplane-ebpf/src/frame";
const EBPF_HELPERS: &str = "dataplane-ebpf/src/helpers";
const THIS_FILE: &str = "xtask/src/lint/boundaries.rs";
const XTASK: &str = "xtask";

/// In files below `within`, only files below one of `only` use `words`.
struct Rule {
    within: &'static str,
    words: &'static [&'static str],
    only: &'static [&'static str],
    why: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        within: AGENT,
        words: &["aya::"],
        only: &[AGENT_DATAPATH],
        why: "only `datapath` loads programs and reads maps",
    },
    Rule {
        within: AGENT,
        words: &["rtnetlink::", "netlink_packet"],
        only: &[AGENT_NETLINK],
        why: "only `netlink` talks rtnetlink",
    },
    Rule {
        within: AGENT,
        words: &["k8s_openapi::", "kube::"],
        only: &[AGENT_ALLOCATE, AGENT_EVENT_RECORDER, AGENT_CLUSTER, AGENT_LIFECYCLE, AGENT_SOURCE],
        why: "the agent's state has no Kubernetes types",
    },
    Rule {
        within: AGENT_SOURCE,
        words: &["abi::", "datapath::"],
        only: &[],
        why: "a source does not know the layout of maps",
    },
    Rule {
        within: AGENT_COMPILE,
        words: &[
            "std::fs",
            "std::net::Tcp",
            "tokio::",
            "std::time::Instant",
            "SystemTime",
            "crate::datapath",
        ],
        only: &[],
        why: "a pure function: no clock, no input or output",
    },
    Rule {
        within: EBPF,
        words: &["as *const", "as *mut", ".cast::<", ".cast()"],
        only: &[EBPF_FRAME, EBPF_HELPERS, EBPF_MAPS],
        why: "raw pointers are used where their bounds are checked",
    },
    Rule {
        within: CNI,
        words: &["aya", "kube::", "k8s_openapi", "dataplane_agent"],
        only: &[],
        why: "the plugin runs for every pod: it has few dependencies",
    },
    Rule {
        within: XTASK,
        words: &["dataplane_agent::", "dataplane_cni::", "dataplane_common::"],
        only: &[THIS_FILE],
        why: "xtask builds these crates and cannot depend on them",
    },
];

/// Crate roots that must forbid unsafe code.
const SAFE: [&str; 5] = [
    "dataplane-agent/src/lib.rs",
    "dataplane-agent/src/main.rs",
    "dataplane-cni/src/lib.rs",
    "dataplane-cni/src/main.rs",
    "xtask/src/main.rs",
];

pub(super) fn check() -> Result<Outcome> {
    let mut found = missing(|path| workspace::root().join(path).exists());
    for (file, text) in read("rs")? {
        found.extend(violations(&file, &text));
    }
    for file in SAFE {
        if !read_file(Path::new(file))?.contains("#![forbid(unsafe_code)]") {
            found.push(format!("{file}:1: does not forbid unsafe code; add `#![forbid(unsafe_code)]`"));
        }
    }
    outcome("boundaries are crossed", &found)
}

/// Paths of the rules that do not exist.
fn missing(exists: impl Fn(&str) -> bool) -> Vec<String> {
    let paths = RULES.iter().flat_map(|rule| rule.only.iter().chain([&rule.within]));
    paths
        .filter(|path| !exists(path))
        .map(|path| format!("{THIS_FILE}:1: {path} does not exist; correct its constant"))
        .collect()
}

/// Lines of code, without comments, that use what they must not.
fn violations(file: &Path, text: &str) -> Vec<String> {
    let rules = RULES.iter().filter(|rule| {
        file.starts_with(rule.within) && !rule.only.iter().any(|allowed| file.starts_with(allowed))
    });
    let mut found = Vec::new();
    for rule in rules {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if let Some(word) = rule.words.iter().find(|word| uses(code, word)) {
                found.push(format!(
                    "{}:{}: {word} may not be used here: {}",
                    file.display(),
                    number + 1,
                    rule.why
                ));
            }
        }
    }
    found
}

/// Whether `code` contains `word`, and not only as the end of a longer name.
fn uses(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_') || !word.starts_with(char::is_alphanumeric)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_in_the_wrong_place_is_reported() {
        let text = "//! aya:: in a comment\nuse aya::Ebpf;\n";
        let found = violations(Path::new("dataplane-agent/src/app.rs"), text);
        assert_eq!(
            found,
            [
                "dataplane-agent/src/app.rs:2: aya:: may not be used here: only `datapath` loads programs and reads maps"
            ]
        );
        assert!(violations(Path::new("dataplane-agent/src/datapath/loader.rs"), text).is_empty());
    }

    #[test]
    fn a_path_that_does_not_exist_is_reported() {
        assert!(missing(|_| true).is_empty());
        let found = missing(|path| path != EBPF_MAPS);
        assert_eq!(found, [format!("{THIS_FILE}:1: {EBPF_MAPS} does not exist; correct its constant")]);
    }

    #[test]
    fn the_end_of_a_longer_name_is_not_reported() {
        assert!(!uses("use himalaya::x;", "aya::"));
        assert!(uses("let p = x as *const u8;", "as *const"));
    }
}
