//! Network namespaces, given by an open file.

use std::{fs::File, thread};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

/// Moves this thread into a network namespace.
pub(super) fn enter(namespace: &File) -> Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")
}

/// Runs `task` in a network namespace on a new thread; `None`: on the caller's thread.
pub(super) fn within<T: Send>(
    namespace: Option<&File>,
    task: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let Some(namespace) = namespace else { return task() };
    thread::scope(|scope| {
        let thread = scope.spawn(|| enter(namespace).and_then(|()| task()));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
