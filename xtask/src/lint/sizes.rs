//! Lists files that are too long to be about one thing.

use std::fs;

use anyhow::{Context as _, Result};

use super::Outcome;
use crate::workspace;

/// A file above this is looked at.
const LINES: usize = 400;

pub(super) fn check() -> Result<Outcome> {
    let mut long = Vec::new();
    for file in workspace::files("rs")? {
        let text = fs::read_to_string(workspace::root().join(&file))
            .with_context(|| format!("read {}", file.display()))?;
        let lines = text.lines().count();
        if lines > LINES {
            long.push(format!("      {} has {lines} lines: is it about one thing?", file.display()));
        }
    }
    Ok(if long.is_empty() { Outcome::Ok } else { Outcome::Note(long.join("\n")) })
}
