//! What a panic does: it ends the process.
//!
//! tokio catches the panic of a task, and the other tasks keep running. An agent without one of its
//! tasks must not: kubelet restarts a process that has ended, and tables and programs stay in the
//! kernel meanwhile.

use std::{panic, process};

/// Makes a panic of any thread print its message and abort the process, as `panic = "abort"` does.
pub fn abort_on_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        print(info);
        process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::{
        env,
        os::unix::process::ExitStatusExt as _,
        process::{Command, Stdio},
    };

    use nix::sys::signal::Signal;
    use tokio::runtime::Builder;

    use super::*;

    /// Set in the process that is to abort.
    const CHILD: &str = "DATAPLANE_TEST_ABORT_ON_PANIC";

    #[test]
    fn panic_in_a_task_aborts_the_process() {
        if env::var_os(CHILD).is_some() {
            abort_on_panic();
            let runtime = Builder::new_multi_thread().worker_threads(1).build().unwrap();
            let task = runtime.spawn(async { panic!("a task panics") });
            let _caught = runtime.block_on(task);
            return;
        }
        let mut child = Command::new(env::current_exe().unwrap());
        child.args(["--exact", "panics::tests::panic_in_a_task_aborts_the_process", "--nocapture"]);
        let output = child.env(CHILD, "1").stdin(Stdio::null()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(Signal::SIGABRT as i32), "{}: {stderr}", output.status);
        assert!(stderr.contains("a task panics"), "{stderr}");
    }
}
