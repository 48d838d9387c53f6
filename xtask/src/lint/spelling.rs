//! Common misspellings, by the word list of `typos`.
//!
//! The list is the source file of the crate `typos-dict`, which takes half a CPU-minute to compile.
//! It is therefore read as text: xtask declares the crate for a target that does not exist, so that
//! cargo pins and downloads it and never builds it.

use std::{collections::HashMap, fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use super::{Outcome, outcome, read};
use crate::workspace;

const EXTENSIONS: [&str; 6] = ["rs", "md", "toml", "yaml", "yml", "sh"];

/// Shorter words are more often abbreviations than misspellings.
const LETTERS: usize = 4;

/// Words that the list takes for misspellings: where they stand, in lower case, and why.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("", "parms", "TCA_TBF_PARMS of the kernel"),
    ("", "proxys", "possessive in names: kube_proxys_rules"),
    ("dataplane-agent/src/source/manifests", "servce", "a mistake that a test makes"),
    ("dataplane-agent/src/source/manifests", "servise", "a mistake that a test makes"),
    ("docs/manifests.md", "servce", "a mistake that the page explains"),
    ("tests", "lables", "a mistake that a test makes"),
    ("xtask/src/lint/spelling.rs", "*", "misspellings of the tests and of this list"),
];

/// Misspelling → corrections.
type Words<'a> = HashMap<&'a str, Vec<&'a str>>;

pub(super) fn check() -> Result<Outcome> {
    let list = word_list()?;
    let words = parse(&list);
    ensure!(words.len() > 50_000, "the word list of typos-dict has another form now: see lint/spelling.rs");
    let mut found = Vec::new();
    for extension in EXTENSIONS {
        for (file, text) in read(extension)? {
            found.extend(misspellings(&file, &text, &words));
        }
    }
    outcome("words are misspelled (or missing from ALLOWED in lint/spelling.rs)", &found)
}

/// The source text of the word list, from cargo's registry.
fn word_list() -> Result<String> {
    let packages = workspace::metadata()?["packages"].as_array().context("cargo metadata: packages")?;
    let package = packages.iter().find(|package| package["name"] == "typos-dict");
    let manifest = package.and_then(|package| package["manifest_path"].as_str());
    let file =
        Path::new(manifest.context("typos-dict is not a dependency")?).with_file_name("src/word_codegen.rs");
    fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
}

/// Entries have the form `…::Ascii("misspelling"), &["correction", …]`.
fn parse(list: &str) -> Words<'_> {
    let entries = list.split("::Ascii(\"").skip(1).filter_map(|entry| {
        let (word, rest) = entry.split_once('"')?;
        let (_, rest) = rest.split_once('[')?;
        let (corrections, _) = rest.split_once(']')?;
        let corrections: Vec<&str> = corrections.split('"').skip(1).step_by(2).collect();
        (word.len() >= LETTERS).then_some((word, corrections))
    });
    entries.collect()
}

fn misspellings(file: &Path, text: &str, words: &Words<'_>) -> Vec<String> {
    let allowed: Vec<&str> =
        ALLOWED.iter().filter(|(path, ..)| file.starts_with(path)).map(|(_, word, _)| *word).collect();
    let mut found = Vec::new();
    if allowed.contains(&"*") {
        return found;
    }
    for (index, line) in text.lines().enumerate() {
        // `\n` in a string literal is not the first letter of a word
        let line = line.replace("\\n", "  ");
        let parts = line.split(|c: char| !c.is_ascii_alphanumeric()).filter(|part| part.len() >= LETTERS);
        for word in parts.flat_map(split) {
            let lower = word.to_ascii_lowercase();
            let Some(corrections) = words.get(lower.as_str()) else { continue };
            if allowed.contains(&lower.as_str()) {
                continue;
            }
            let at = format!("{}:{}", file.display(), index + 1);
            found.push(match &corrections[..] {
                [] => format!("{at}: {word} is misspelled"),
                _ => format!("{at}: {word} is misspelled; write {}", corrections.join(" or ")),
            });
        }
    }
    found
}

/// The words of an identifier in camel case: `TcpSynAck`, `podCIDRs`. None if it has digits: hashes
/// and addresses do.
fn split(identifier: &str) -> Vec<&str> {
    if identifier.bytes().any(|byte| byte.is_ascii_digit()) {
        return Vec::new();
    }
    let bytes = identifier.as_bytes();
    let mut starts = vec![0];
    for at in 1..bytes.len() {
        let after_lower = bytes[at - 1].is_ascii_lowercase() && bytes[at].is_ascii_uppercase();
        let last_upper = bytes[at - 1].is_ascii_uppercase()
            && bytes[at].is_ascii_uppercase()
            && bytes.get(at + 1).is_some_and(u8::is_ascii_lowercase);
        if after_lower || last_upper {
            starts.push(at);
        }
    }
    let ends = starts.iter().skip(1).copied().chain([bytes.len()]);
    starts.iter().zip(ends).map(|(&start, end)| &identifier[start..end]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "(dictgen::InsensitiveStr::Ascii(\"recieve\"), &[\"receive\"]),\n(\n    \
                        dictgen::InsensitiveStr::Ascii(\"adress\"),\n    &[\"address\", \"dress\"],\n)";

    #[test]
    fn misspellings_are_reported_with_their_corrections() {
        let words = parse(LIST);
        let found = misspellings(Path::new("a.md"), "receive\nRecieve the peerAdress\n", &words);
        assert_eq!(
            found,
            [
                "a.md:2: Recieve is misspelled; write receive",
                "a.md:2: Adress is misspelled; write address or dress"
            ]
        );
        assert!(misspellings(Path::new("a.md"), "an address, recieve1, 0xadress0\n", &words).is_empty());
    }

    #[test]
    fn an_escape_is_not_a_letter() {
        let words = HashMap::from([("nversion", vec!["inversion"])]);
        assert!(misspellings(Path::new("a.rs"), "\"a\\nversion\"\n", &words).is_empty());
        assert_eq!(misspellings(Path::new("a.rs"), "nversion\n", &words).len(), 1);
    }

    #[test]
    fn allowed_words_are_allowed_only_where_they_stand() {
        let words = HashMap::from([("lables", vec!["labels"])]);
        assert!(misspellings(Path::new("tests/a.rs"), "lables\n", &words).is_empty());
        assert_eq!(misspellings(Path::new("docs/a.md"), "lables\n", &words).len(), 1);
    }

    #[test]
    fn identifiers_are_split_into_words() {
        assert_eq!(split("TcpSynAck"), ["Tcp", "Syn", "Ack"]);
        assert_eq!(split("HTTPServer"), ["HTTP", "Server"]);
        assert_eq!(split("word"), ["word"]);
        assert!(split("a1b2").is_empty());
    }
}
