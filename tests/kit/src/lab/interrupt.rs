//! Removes clusters before a signal ends the process.

use std::{
    io::Read as _,
    os::fd::{AsRawFd as _, IntoRawFd as _},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
    thread,
};

use anyhow::{Result, anyhow};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::resources;

static PIPE: AtomicI32 = AtomicI32::new(-1);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether a signal is ending the process: its clusters are being removed, and errors from now on
/// are not failures.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Cleanups besides the removal of clusters.
static CLEANUPS: Mutex<Vec<fn()>> = Mutex::new(Vec::new());

/// Runs `work` when the process exits: for resources that tests share, as none of them is known to
/// be the last.
///
/// # Panics
/// If `atexit` fails.
pub fn at_exit(work: fn()) {
    static AT_EXIT: Mutex<Vec<fn()>> = Mutex::new(Vec::new());
    extern "C" fn run() {
        // on another thread: the thread-local storage of the main thread is already gone
        let works = std::mem::take(&mut *AT_EXIT.lock().unwrap_or_else(PoisonError::into_inner));
        let _panic_is_printed = thread::spawn(move || works.iter().for_each(|work| work())).join();
    }
    let mut works = AT_EXIT.lock().unwrap_or_else(PoisonError::into_inner);
    if works.is_empty() {
        // SAFETY: `run` is a function of this program, valid until the process ends.
        let refused = unsafe { libc::atexit(run) };
        assert_eq!(refused, 0, "atexit");
    }
    works.push(work);
}

/// Runs `work` before a signal ends the process.
pub fn on_interrupt(work: fn()) -> Result<()> {
    CLEANUPS.lock().unwrap_or_else(PoisonError::into_inner).push(work);
    install()
}

/// Installs handlers of SIGINT, SIGTERM and SIGHUP that remove this process's clusters and end it.
/// Repeated calls have no effect.
pub(super) fn install() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| try_install().map_err(|error| format!("{error:#}")));
    installed.clone().map_err(|error| anyhow!("install signal handlers: {error}"))
}

fn try_install() -> Result<()> {
    let (mut read, write) = std::io::pipe()?;
    PIPE.store(write.as_raw_fd(), Ordering::SeqCst);
    // stays open until the process ends
    let _never_closed = write.into_raw_fd();
    thread::spawn(move || {
        let mut signal = [0];
        if read.read_exact(&mut signal).is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
            eprintln!("interrupted: removing the cluster");
            let _removal_lock = resources::remove_owned();
            for work in CLEANUPS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                work();
            }
            // `_exit` skips `atexit` functions: they would wait for the lock held here
            // SAFETY: the process ends here; no other code sees inconsistent state.
            unsafe { libc::_exit(128 + i32::from(signal[0])) };
        }
    });
    let action = SigAction::new(SigHandler::Handler(report), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only calls write(2), which is async-signal-safe, on a descriptor that
        // stays open.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

extern "C" fn report(signal: i32) {
    let [byte, ..] = signal.to_le_bytes();
    // SAFETY: reads one byte of this stack frame; the pipe stays open.
    let _full = unsafe { libc::write(PIPE.load(Ordering::SeqCst), (&raw const byte).cast(), 1) };
}
