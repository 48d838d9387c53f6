//! Other programs: prints each command before it runs, and fails with the command's name. Their
//! output goes to stderr, so that only results are on stdout.

use std::{
    env,
    ffi::OsStr,
    fs, io,
    os::{
        fd::AsFd as _,
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

/// Directories of administration programs, which are not in every user's `PATH`.
const ADMIN_DIRECTORIES: &str = "/usr/local/sbin:/usr/sbin:/sbin";

/// Prints a command, runs it and waits for it.
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

/// The standard output of a command. The error contains its standard error.
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

/// Replaces this process by the program. Returns only if that fails.
pub(crate) fn become_program(command: &mut Command) -> anyhow::Error {
    let error = command.exec();
    anyhow::Error::new(error).context(format!("run {}", line(command)))
}

/// The program of this name in `PATH` or in a directory of administration programs.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let admin = env::split_paths(ADMIN_DIRECTORIES);
    env::split_paths(&path).chain(admin).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// Whether the effective user is root: the owner of this process's directory in `/proc`.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Processor time, user and system, of all commands that have ended, with what they started.
pub(crate) fn cpu_of_children() -> Duration {
    // proc_pid_stat(5): fields 16 and 17, `cutime` and `cstime`, in ticks of 1/100 s; the name in
    // field 2 may contain spaces
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name.split_whitespace().skip(13).take(2).filter_map(|field| field.parse::<u64>().ok());
    Duration::from_millis(10 * ticks.sum::<u64>())
}

/// The command as a user types it.
pub(crate) fn line(command: &Command) -> String {
    let variables =
        command.get_envs().filter_map(|(name, value)| Some(format!("{}={}", name.display(), quoted(value?))));
    let program = command.get_program();
    // `cargo run` sets `CARGO` to its path
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
    fn command_is_printed_as_a_user_types_it() {
        let mut command = Command::new("cargo");
        command.env("RUSTDOCFLAGS", "-Dwarnings").args(["doc", "it's", ""]);
        assert_eq!(line(&command), r"RUSTDOCFLAGS=-Dwarnings cargo doc 'it'\''s' ''");
    }

    #[test]
    fn processor_time_of_a_command_is_counted() {
        let before = cpu_of_children();
        let count = "i=0; while [ $i -lt 200000 ]; do i=$((i + 1)); done";
        output(Command::new("sh").args(["-c", count])).unwrap();
        assert!(cpu_of_children() > before);
    }

    #[test]
    fn error_has_the_command_and_its_standard_error() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3") && text.contains("why"), "{text}");
    }
}
