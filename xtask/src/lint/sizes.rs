//! A Rust file has at most 400 lines: a longer one has more than one subject.

use std::path::Path;

use anyhow::Result;

use super::{Outcome, outcome, read};

const LINES: usize = 400;

pub(super) fn check() -> Result<Outcome> {
    let files = read("rs")?;
    let found: Vec<String> = files.iter().filter_map(|(file, text)| too_long(file, text)).collect();
    outcome("files are too long", &found)
}

fn too_long(file: &Path, text: &str) -> Option<String> {
    let lines = text.lines().count();
    (lines > LINES).then(|| {
        format!("{}:{lines}: {lines} lines, {LINES} are allowed; split it by subject", file.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_above_the_limit_are_reported() {
        let file = Path::new("a.rs");
        assert_eq!(too_long(file, &"x\n".repeat(LINES)), None);
        let found = too_long(file, &"x\n".repeat(LINES + 1)).expect("too long");
        assert!(found.starts_with("a.rs:401: 401 lines"), "{found}");
    }
}
