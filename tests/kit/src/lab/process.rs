//! Processes in a network namespace and a cgroup. Both are entered before the program starts, so
//! that its first socket already belongs to them.
//!
//! Dropping a [`Process`] kills it. [`super::resources`] finds processes of a crashed owner by
//! their cgroup.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use super::{netns::Namespace, wait};

/// Where a program runs: network namespace, cgroup, log directory.
#[derive(Clone, Debug)]
pub struct Place {
    namespace: Namespace,
    cgroup: PathBuf,
    logs: PathBuf,
}

impl Place {
    /// Creates the cgroup and the log directory.
    pub(super) fn new(namespace: Namespace, cgroup: &Path, logs: &Path) -> Result<Self> {
        fs::create_dir_all(cgroup).with_context(|| format!("make cgroup {}", cgroup.display()))?;
        fs::create_dir_all(logs).with_context(|| format!("make directory {}", logs.display()))?;
        Ok(Self { namespace, cgroup: cgroup.to_owned(), logs: logs.to_owned() })
    }

    pub const fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The log directory.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// A command that enters this place before it executes the program.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let namespace = self.namespace.file();
        let procs = self.cgroup.join("cgroup.procs");
        let cgroup =
            OpenOptions::new().write(true).open(&procs).with_context(|| procs.display().to_string())?;
        let mut command = Command::new(program);
        let enter = move || {
            // "0" means the writing process
            (&cgroup).write_all(b"0")?;
            setns(&*namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(())
        };
        // SAFETY: between fork and exec only `write` and `setns` are called, on descriptors opened
        // before; neither allocates nor takes a lock.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// Runs a program to its end and returns its stdout. The error contains its output.
    pub fn run(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Result<String> {
        let program = program.as_ref();
        let output = self.output(program, arguments)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let problem = String::from_utf8_lossy(&output.stderr);
            bail!(
                "in {}: {} {}: {}\n{}{}",
                self.namespace.name(),
                program.display(),
                arguments.join(" "),
                output.status,
                text,
                problem
            );
        }
        Ok(text)
    }

    /// Runs a program to its end and returns its output, whatever the exit status.
    pub fn output(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Result<Output> {
        let program = program.as_ref();
        let mut command = self.command(program)?;
        let command = command.args(arguments).stdin(Stdio::null());
        command.output().with_context(|| format!("run {}", program.display()))
    }

    /// Starts a program without stdin that writes its output to `log`.
    pub fn daemon(&self, program: impl AsRef<OsStr>, arguments: &[&str], log: &Path) -> Result<Process> {
        let mut command = self.command(program.as_ref())?;
        command.args(arguments);
        Process::daemon(command, log)
    }

    /// Starts a program with a pipe as stdin that closes when the handle is dropped; its stderr is
    /// logged.
    pub fn start(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Result<Process> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let program = Path::new(program.as_ref());
        let name = program.file_name().unwrap_or_default().display().to_string();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = self.logs.join(format!("{}-{name}-{number}.log", self.namespace.name()));
        let mut command = self.command(program)?;
        command.args(arguments);
        Process::start(command, &log)
    }
}

/// A running program.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Arc<Lines>,
    log: PathBuf,
    what: String,
    is_detached: bool,
}

/// Output so far, and whether stdout was closed.
#[derive(Debug, Default)]
struct Lines {
    state: Mutex<(Vec<String>, bool)>,
    changed: Condvar,
}

impl Process {
    fn start(mut command: Command, log: &Path) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(open_log(log)?);
        let mut process = Self::spawn(command, log)?;
        process.stdin = process.child.stdin.take();
        let stdout = process.child.stdout.take().context("a child has no stdout")?;
        let sink = Arc::clone(&process.lines);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                sink.state.lock().unwrap_or_else(PoisonError::into_inner).0.push(line);
                sink.changed.notify_all();
            }
            sink.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
            sink.changed.notify_all();
        });
        Ok(process)
    }

    /// Starts a command without stdin that writes its output to `log`.
    pub(crate) fn daemon(mut command: Command, log: &Path) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(open_log(log)?).stderr(open_log(log)?);
        Self::spawn(command, log)
    }

    fn spawn(mut command: Command, log: &Path) -> Result<Self> {
        let what = format!("{} ({})", Path::new(command.get_program()).display(), log.display());
        // not the terminal's process group: Ctrl-C ends only this process, which ends its children
        let child = command.process_group(0).spawn().with_context(|| format!("start {what}"))?;
        Ok(Self { child, stdin: None, lines: Arc::default(), log: log.to_owned(), what, is_detached: false })
    }

    /// Leaves the process running when the handle is dropped.
    pub fn detach(mut self) {
        self.is_detached = true;
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// All lines printed so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.state.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Waits for the first line for which `wanted` returns a value; lines printed before count.
    pub fn wait_line<T>(&self, deadline: Duration, mut wanted: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let deadline = wait::scale(deadline);
        let end = Instant::now() + deadline;
        let mut seen = 0;
        let mut state = self.lines.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = state.0.get(seen..).unwrap_or_default().iter().find_map(|line| wanted(line))
            {
                return Ok(found);
            }
            seen = state.0.len();
            if state.1 {
                bail!("{} ended without printing the expected line; {}", self.what, self.tail());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{} did not print the expected line within {deadline:?}; {}", self.what, self.tail());
            }
            state = self.lines.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Closes its stdin, waits until it ends, and returns its lines.
    pub fn finish(mut self, deadline: Duration) -> Result<Vec<String>> {
        drop(self.stdin.take());
        let status = self.wait(deadline)?;
        let what = self.what.clone();
        let printed = wait::until("its output", Duration::from_secs(5), || {
            let state = self.lines.state.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(state.1.then(|| state.0.clone()))
        })?;
        if !status.success() {
            bail!("{what}: {status}; {}", self.tail());
        }
        Ok(printed)
    }

    /// Waits until it ends.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("end of {}", self.what);
        wait::until(&what, deadline, || Ok(self.child.try_wait()?))
    }

    /// Fails if the process has ended.
    pub fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}; {}", self.what, self.tail()),
        }
    }

    /// Kills it with SIGKILL, as a crash would. Fails if it had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        if status.signal().is_none() {
            bail!("{} had ended before it was killed: {status}; {}", self.what, self.tail());
        }
        Ok(())
    }

    /// Sends SIGTERM, as a service manager does, and waits until it ends.
    pub fn terminate(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        self.wait(deadline)
    }

    fn tail(&self) -> String {
        format!("its log ends with:\n{}", tail(&self.log, 15))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_detached {
            return;
        }
        // it may have ended already; other errors cannot be handled here
        let _may_have_ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn open_log(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| format!("open log {}", path.display()))
}

/// The last lines of a file, or the error of reading it.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => return format!("({}: {error})", path.display()),
    };
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}
