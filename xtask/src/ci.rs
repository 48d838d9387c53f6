//! `ci`: lint, then the test command the README tells people to type; so the README is true.

use std::{fs, process::Command, time::Instant};

use anyhow::{Context as _, Result};

use crate::{lint, process, workspace};

/// Stands before the code block of the README that holds the test command.
const MARK: &str = "<!-- ci: test -->";

pub(crate) fn run() -> Result<()> {
    let readme = workspace::root().join("README.md");
    let text = fs::read_to_string(&readme).with_context(|| format!("read {}", readme.display()))?;
    let tests =
        marked_command(&text).with_context(|| format!("{}: no code block after {MARK}", readme.display()))?;

    let start = Instant::now();
    lint::run(&lint::Args::default())?;
    let linted = start.elapsed();
    let start = Instant::now();
    process::run(Command::new("sh").args(["-e", "-c", &tests]).current_dir(workspace::root()))?;
    println!("\nci: OK (lint {linted:.0?}, tests {:.0?})", start.elapsed());
    Ok(())
}

/// The content of the code block after the mark.
fn marked_command(readme: &str) -> Option<String> {
    let mut lines = readme.lines().skip_while(|line| line.trim() != MARK).skip(1);
    lines.find(|line| !line.trim().is_empty()).filter(|line| line.starts_with("```"))?;
    let command: Vec<&str> = lines.take_while(|line| !line.starts_with("```")).collect();
    (!command.is_empty()).then(|| command.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_the_block_after_the_mark() {
        let readme = "```sh\nno\n```\n\n<!-- ci: test -->\n\n```sh\ncargo xtask test\n```\n```sh\nno\n```\n";
        assert_eq!(marked_command(readme).as_deref(), Some("cargo xtask test"));
    }

    #[test]
    fn a_readme_without_mark_or_block_has_no_command() {
        assert_eq!(marked_command("```sh\ncargo xtask test\n```\n"), None);
        assert_eq!(marked_command("<!-- ci: test -->\ntext\n```sh\nx\n```\n"), None);
    }
}
