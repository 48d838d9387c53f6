//! Who may use what: the boundaries between modules that a reader relies on, kept by looking for words.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use super::Outcome;
use crate::workspace;

/// In files below `within`, `words` stand only below one of `only`.
struct Rule {
    within: &'static str,
    words: &'static [&'static str],
    only: &'static [&'static str],
    why: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        within: "dataplane-agent/src",
        words: &["aya::"],
        only: &["dataplane-agent/src/datapath"],
        why: "one module talks to the kernel's eBPF side",
    },
    Rule {
        within: "dataplane-agent/src",
        words: &["rtnetlink::", "netlink_packet"],
        only: &["dataplane-agent/src/netlink"],
        why: "one module talks rtnetlink",
    },
    Rule {
        within: "dataplane-agent/src",
        words: &["k8s_openapi::", "kube::"],
        only: &[
            "dataplane-agent/src/allocate",
            "dataplane-agent/src/event_recorder.rs",
            "dataplane-agent/src/cluster",
            "dataplane-agent/src/lifecycle",
            "dataplane-agent/src/source",
        ],
        why: "no Kubernetes type passes the state",
    },
    Rule {
        within: "dataplane-agent/src/source",
        words: &["abi::", "datapath::"],
        only: &[],
        why: "a source knows no map",
    },
    Rule {
        within: "dataplane-agent/src/compile",
        words: &[
            "std::fs",
            "std::net::Tcp",
            "tokio::",
            "std::time::Instant",
            "SystemTime",
            "crate::datapath",
        ],
        only: &[],
        why: "same input, same output: no clock, no input or output",
    },
    Rule {
        within: "dataplane-ebpf/src",
        words: &["as *const", "as *mut", ".cast::<", ".cast()"],
        only: &["dataplane-ebpf/src/packet.rs", "dataplane-ebpf/src/skb.rs", "dataplane-ebpf/src/maps.rs"],
        why: "raw pointers are where their bounds are checked",
    },
    Rule {
        within: "dataplane-cni",
        words: &["aya", "kube::", "k8s_openapi", "dataplane_agent"],
        only: &[],
        why: "the plugin runs for every pod: small, and without the agent's world",
    },
    Rule {
        within: "xtask",
        words: &["dataplane_agent::", "dataplane_cni::", "dataplane_common::"],
        only: &["xtask/src/lint/boundaries.rs"],
        why: "xtask builds our crates, so it cannot be made of them",
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
    let mut broken = Vec::new();
    for file in workspace::files("rs")? {
        let text = read(&file)?;
        broken.extend(violations(&file, &text));
    }
    for file in SAFE {
        if !read(Path::new(file))?.contains("#![forbid(unsafe_code)]") {
            broken.push(format!("{file}: forbids no unsafe code"));
        }
    }
    if !broken.is_empty() {
        bail!("boundaries are crossed:\n  {}", broken.join("\n  "));
    }
    Ok(Outcome::Ok)
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(workspace::root().join(file)).with_context(|| format!("read {}", file.display()))
}

/// Lines of code, comments left out, that use what they must not.
fn violations(file: &Path, text: &str) -> Vec<String> {
    let rules = RULES.iter().filter(|rule| {
        file.starts_with(rule.within) && !rule.only.iter().any(|allowed| file.starts_with(allowed))
    });
    let mut found = Vec::new();
    for rule in rules {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if let Some(word) = rule.words.iter().find(|word| uses(code, word)) {
                found.push(format!("{}:{}: {word} ({})", file.display(), number + 1, rule.why));
            }
        }
    }
    found
}

/// Whether `word` stands in `code` and is not the end of a longer name.
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
    fn a_word_in_the_wrong_place_is_found_and_named() {
        let text = "//! aya:: is not for us\nuse aya::Ebpf;\n";
        let found = violations(Path::new("dataplane-agent/src/app.rs"), text);
        assert_eq!(
            found,
            ["dataplane-agent/src/app.rs:2: aya:: (one module talks to the kernel's eBPF side)"]
        );
        assert!(violations(Path::new("dataplane-agent/src/datapath/loader.rs"), text).is_empty());
    }

    #[test]
    fn the_end_of_a_longer_name_is_another_name() {
        assert!(!uses("use himalaya::x;", "aya::"));
        assert!(uses("let p = x as *const u8;", "as *const"));
    }
}
