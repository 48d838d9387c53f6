//! Ctrl-C and its kin: clusters go before the process does.

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

use super::site;

static PIPE: AtomicI32 = AtomicI32::new(-1);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The clusters are being removed: what fails from now on says nothing.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// What others have to remove.
static ALSO: Mutex<Vec<fn()>> = Mutex::new(Vec::new());

/// Does `work` when the process ends by itself: for what its tests share, as nobody of them knows who is the last.
///
/// # Panics
/// If the C library has no room for it.
pub fn at_end(work: fn()) {
    static AT_END: Mutex<Vec<fn()>> = Mutex::new(Vec::new());
    extern "C" fn run() {
        // the main thread has given up what it kept for itself
        let works = std::mem::take(&mut *AT_END.lock().unwrap_or_else(PoisonError::into_inner));
        let _its_panic_is_told = thread::spawn(move || works.iter().for_each(|work| work())).join();
    }
    let mut works = AT_END.lock().unwrap_or_else(PoisonError::into_inner);
    if works.is_empty() {
        // SAFETY: the function is one of this program, which is there as long as the process.
        let refused = unsafe { libc::atexit(run) };
        assert_eq!(refused, 0, "atexit");
    }
    works.push(work);
}

/// Does `work`, too, before an interrupted process ends.
pub fn also(work: fn()) -> Result<()> {
    ALSO.lock().unwrap_or_else(PoisonError::into_inner).push(work);
    install()
}

/// Makes SIGINT, SIGTERM and SIGHUP remove this process's clusters and end it. Once is enough.
pub(super) fn install() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| try_install().map_err(|error| format!("{error:#}")));
    installed.clone().map_err(|error| anyhow!("install signal handlers: {error}"))
}

fn try_install() -> Result<()> {
    let (mut read, write) = std::io::pipe()?;
    PIPE.store(write.as_raw_fd(), Ordering::SeqCst);
    // open as long as the process
    let _never_closed = write.into_raw_fd();
    thread::spawn(move || {
        let mut signal = [0];
        if read.read_exact(&mut signal).is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
            eprintln!("interrupted: removing the cluster");
            let _nobody_else_removes = site::remove_owned();
            for work in ALSO.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                work();
            }
            // past what others do at the end of the process: it would wait for us, who remove everything
            // SAFETY: the process ends here, and nobody sees what it leaves half done.
            unsafe { libc::_exit(128 + i32::from(signal[0])) };
        }
    });
    let action = SigAction::new(SigHandler::Handler(report), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only calls write(2) on a descriptor that stays open, which a handler may.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

extern "C" fn report(signal: i32) {
    let [byte, ..] = signal.to_le_bytes();
    // SAFETY: one byte of this frame, to a pipe that stays open.
    let _full = unsafe { libc::write(PIPE.load(Ordering::SeqCst), (&raw const byte).cast(), 1) };
}
