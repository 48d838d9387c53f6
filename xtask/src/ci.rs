//! `ci`: lint, then the test command of the README, so that the README's command is known to work.
//! Prints the time of each step.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{lint, process, test, workspace};

/// Marks the code block of the README that contains the test command.
const MARK: &str = "<!-- ci: test -->";

pub(crate) fn run() -> Result<()> {
    let readme = workspace::root().join("README.md");
    let text = fs::read_to_string(&readme).with_context(|| format!("read {}", readme.display()))?;
    let tests =
        marked_command(&text).with_context(|| format!("{}: no code block after {MARK}", readme.display()))?;

    let start = Instant::now();
    let mut steps = Vec::new();
    steps.push(time("lint", || lint::run(&lint::Args::default()))?);
    steps.push(time("build of tests", test::build)?);
    steps.push(time("tests", || {
        process::run(Command::new("sh").args(["-e", "-c", &tests]).current_dir(workspace::root()))
    })?);
    steps.push(Step { name: "total", wall: start.elapsed(), cpu: process::cpu_of_children() });
    println!("\n{}\nci: OK", table(&steps));
    Ok(())
}

/// How long a step took.
struct Step {
    name: &'static str,
    wall: Duration,
    cpu: Duration,
}

fn time(name: &'static str, work: impl FnOnce() -> Result<()>) -> Result<Step> {
    let (start, cpu) = (Instant::now(), process::cpu_of_children());
    work()?;
    Ok(Step { name, wall: start.elapsed(), cpu: process::cpu_of_children().saturating_sub(cpu) })
}

fn table(steps: &[Step]) -> String {
    let mut table = format!("{:<16}{:>10}{:>14}", "", "time", "CPU time");
    for Step { name, wall, cpu } in steps {
        table += &format!("\n{name:<16}{:>10}{:>14}", minutes(*wall), minutes(*cpu));
    }
    table
}

fn minutes(duration: Duration) -> String {
    let seconds = duration.as_secs();
    format!("{} min {:02} s", seconds / 60, seconds % 60)
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
    fn command_is_the_code_block_after_the_mark() {
        let readme = "```sh\nno\n```\n\n<!-- ci: test -->\n\n```sh\ncargo xtask test\n```\n```sh\nno\n```\n";
        assert_eq!(marked_command(readme).as_deref(), Some("cargo xtask test"));
    }

    #[test]
    fn readme_without_mark_or_code_block_has_no_command() {
        assert_eq!(marked_command("```sh\ncargo xtask test\n```\n"), None);
        assert_eq!(marked_command("<!-- ci: test -->\ntext\n```sh\nx\n```\n"), None);
    }

    #[test]
    fn table_has_a_row_of_times_for_each_step() {
        let step = Step { name: "lint", wall: Duration::from_secs(61), cpu: Duration::from_secs(122) };
        let table = table(&[step]);
        assert_eq!(table.lines().nth(1), Some("lint            1 min 01 s    2 min 02 s"));
    }
}
