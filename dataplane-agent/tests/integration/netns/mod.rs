//! New network and mount namespaces for a test, on a thread that ends with them.

use std::{future::Future, process::Command, thread};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tokio::runtime;

/// Runs the test in new namespaces, with an async runtime on the namespaces' thread. Skipped
/// without root.
pub(crate) fn in_fresh_netns<T: Future<Output = ()>>(test: impl FnOnce() -> T + Send + 'static) {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("SKIP: creating a network namespace needs root");
        return;
    }
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("root can create namespaces");
        // mounts of the test stay in its namespace
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .expect("root can change mount propagation");
        ip("link set lo up");
        let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
        runtime.block_on(test());
    };
    if let Err(panic) = thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` in the namespace of this thread.
#[track_caller]
pub(crate) fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

#[track_caller]
pub(crate) fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output();
    let output = output.unwrap_or_else(|error| panic!("run {program} (package iproute2): {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    text
}
