//! Relative links of Markdown files lead somewhere.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use super::Outcome;
use crate::workspace;

pub(super) fn check() -> Result<Outcome> {
    let mut broken = Vec::new();
    for file in workspace::files("md")? {
        let path = workspace::root().join(&file);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", file.display()))?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        for target in targets(&text).filter(|target| !directory.join(target).exists()) {
            broken.push(format!("{}: {target}", file.display()));
        }
    }
    if !broken.is_empty() {
        bail!("links that lead nowhere:\n  {}", broken.join("\n  "));
    }
    Ok(Outcome::Ok)
}

/// Files that `[text](file#part)` names outside code.
fn targets(markdown: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    markdown
        .lines()
        .filter(move |line| {
            let is_fence = line.trim_start().starts_with("```");
            is_code ^= is_fence;
            !is_code && !is_fence
        })
        .flat_map(|line| line.split('`').step_by(2))
        .flat_map(|text| text.split("](").skip(1))
        .filter_map(|rest| rest.split_once(')'))
        .map(|(target, _)| target.split(['#', ' ']).next().unwrap_or_default())
        .filter(|target| !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_files_outside_code_are_targets() {
        let text = "[a](docs/a.md#part) and [b](https://b.example/) [c](#here) `[d](d.md)` [e](e.md \"title\")\n\
                    ```\n[f](f.md)\n```\n![g](g.png)\n";
        assert_eq!(targets(text).collect::<Vec<_>>(), ["docs/a.md", "e.md", "g.png"]);
    }
}
