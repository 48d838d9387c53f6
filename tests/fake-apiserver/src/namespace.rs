//! Network namespaces by their open file. Who makes them is no business of an API server.

use std::{fs::File, thread};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

/// Moves this thread into a network namespace.
pub(super) fn enter(namespace: &File) -> Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET).context("enter the network namespace")
}

/// Runs `work` in a network namespace, on a thread of its own, or where the caller is.
pub(super) fn within<T: Send>(
    namespace: Option<&File>,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let Some(namespace) = namespace else { return work() };
    thread::scope(|scope| {
        let thread = scope.spawn(|| enter(namespace).and_then(|()| work()));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
