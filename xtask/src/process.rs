//! Programs we start: announced, checked, with errors that name them. Their output goes to stderr, so that stdout stays
//! what the user asked for.

use std::{
    env,
    ffi::OsStr,
    io,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Where administrators' programs are; not in every user's `PATH`.
const ADMIN_DIRECTORIES: &str = "/usr/local/sbin:/usr/sbin:/sbin";

/// Says what is run, and runs it to its end.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", line(command));
    let stderr = io::stderr().as_fd().try_clone_to_owned()?;
    let status =
        command.stdout(stderr).status().with_context(|| format!("run {}", program(command).display()))?;
    if !status.success() {
        bail!("{}: {status}", line(command));
    }
    Ok(())
}

/// What it prints; an error holds what it complained of.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {}", program(command).display()))?;
    if !output.status.success() {
        bail!("{}: {}\n{}", line(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("read the output of {}", line(command)))
}

/// Becomes the program. Returns only what went wrong.
pub(crate) fn become_program(command: &mut Command) -> anyhow::Error {
    let error = command.exec();
    anyhow::Error::new(error).context(format!("run {}", line(command)))
}

/// The program of this name that a shell of root's would find.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let admin = env::split_paths(ADMIN_DIRECTORIES);
    env::split_paths(&path).chain(admin).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// Whether we are root.
pub(crate) fn is_root() -> bool {
    nix::unistd::Uid::effective().is_root()
}

/// The command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let variables =
        command.get_envs().filter_map(|(name, value)| Some(format!("{}={}", name.display(), quoted(value?))));
    let program = command.get_program();
    // cargo hands its own path on
    let is_cargo = env::var_os("CARGO").is_some_and(|cargo| cargo == program);
    let program = if is_cargo { OsStr::new("cargo") } else { program };
    let words = [program].into_iter().chain(command.get_args()).map(quoted);
    variables.chain(words).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn program(command: &Command) -> &Path {
    Path::new(command.get_program())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_printed_as_it_is_typed() {
        let mut command = Command::new("cargo");
        command.env("RUSTDOCFLAGS", "-Dwarnings").args(["doc", "it's", ""]);
        assert_eq!(line(&command), r"RUSTDOCFLAGS=-Dwarnings cargo doc 'it'\''s' ''");
    }

    #[test]
    fn a_program_that_fails_is_named_with_its_complaint() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3") && text.contains("why"), "{text}");
    }
}
