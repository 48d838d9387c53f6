//! Bulk data at a fixed rate, and the processor time of the whole machine for it.

use std::{
    hint::spin_loop,
    io::Write as _,
    net::TcpStream,
    sync::atomic::{AtomicU8, Ordering},
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{BULK, Latency, Outcome, Run, pin};

/// Bytes per second: 1 Gbit/s, which one processor holds without segmentation offload.
const RATE: u64 = 125_000_000;
/// Bytes of one write.
const CHUNK: usize = 64 << 10;
/// Smallest share of the rate in a valid run.
const RATE_HELD: f64 = 0.95;
/// Longest time between two clock readings of a thread that nothing interrupts; measured: 0.03 µs.
const UNINTERRUPTED: Duration = Duration::from_nanos(500);
const TIMEOUT: Duration = Duration::from_secs(1);

/// Phases of a run.
const WARM_UP: u8 = 0;
const MEASURED: u8 = 1;
const ENDED: u8 = 2;

/// Sends at a fixed rate. The operations of the outcome are megabytes, its seconds are of processor
/// time.
pub(super) fn run(run: &Run) -> Result<Outcome> {
    let mut stream = TcpStream::connect_timeout(&run.target, TIMEOUT)?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(&BULK)?;
    // sleeps end when they should: the default slack is 50 µs
    nix::sys::prctl::set_timerslack(1)?;
    let cores = thread::available_parallelism()?.get();
    let phase = AtomicU8::new(WARM_UP);
    thread::scope(|scope| {
        let idle: Vec<_> = (0..cores)
            .map(|core| {
                scope.spawn({
                    let phase = &phase;
                    move || idle_time(core, phase)
                })
            })
            .collect();
        let sent = send(&mut stream, run, &phase);
        phase.store(ENDED, Ordering::Release);
        let idle = idle.into_iter().map(join).sum::<Result<Duration>>()?;
        let (bytes, elapsed) = sent?;
        let busy = elapsed.mul_f64(cores as f64).saturating_sub(idle);
        outcome(bytes, elapsed, busy)
    })
}

fn join(thread: ScopedJoinHandle<'_, Result<Duration>>) -> Result<Duration> {
    thread.join().map_err(|_panic| anyhow!("a thread that measures idle time panicked"))?
}

/// Sends until the end of the run; returns bytes and time of the measured part.
fn send(stream: &mut TcpStream, run: &Run, phase: &AtomicU8) -> Result<(u64, Duration)> {
    let chunk = vec![b'.'; CHUNK];
    let interval = Duration::from_nanos(CHUNK as u64 * 1_000_000_000 / RATE);
    let mut due = Instant::now();
    let start = due + run.warm_up;
    let mut measured_from = None;
    let mut bytes = 0;
    loop {
        let now = Instant::now();
        if now < due {
            thread::sleep(due - now);
        } else if now - due > 16 * interval {
            // does not make up for a long interruption
            due = now;
        }
        due += interval;
        let now = Instant::now();
        let from = match measured_from {
            None if now >= start => {
                phase.store(MEASURED, Ordering::Release);
                *measured_from.insert(now)
            }
            None => now,
            Some(from) => from,
        };
        if now - from >= run.time {
            return Ok((bytes, now - from));
        }
        stream.write_all(&chunk).context("cannot send")?;
        bytes += if measured_from.is_some() { CHUNK as u64 } else { 0 };
    }
}

/// Returns how long a processor had nothing else to do in the measured phase: a thread that runs
/// only then reads the clock, and a longer time between two readings belongs to others, interrupts
/// included.
fn idle_time(core: usize, phase: &AtomicU8) -> Result<Duration> {
    pin(core)?;
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters are live; 0 is the calling thread.
    let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    ensure!(set == 0, "cannot set SCHED_IDLE: {}", std::io::Error::last_os_error());
    while phase.load(Ordering::Acquire) == WARM_UP {
        spin_loop();
    }
    let mut idle = Duration::ZERO;
    let mut before = Instant::now();
    while phase.load(Ordering::Acquire) == MEASURED {
        let now = Instant::now();
        if now - before <= UNINTERRUPTED {
            idle += now - before;
        }
        before = now;
    }
    Ok(idle)
}

fn outcome(bytes: u64, elapsed: Duration, busy: Duration) -> Result<Outcome> {
    let share = bytes as f64 / elapsed.as_secs_f64() / RATE as f64;
    ensure!(share >= RATE_HELD, "only {:.0} % of the rate", share * 100.0);
    let megabytes = bytes as f64 / 1e6;
    let seconds = busy.as_secs_f64();
    let each = seconds * 1e6 / megabytes;
    Ok(Outcome {
        operations: megabytes as u64,
        seconds,
        per_second: megabytes / seconds,
        errors: 0,
        lost: 0,
        overhead: 0.0,
        latency: Latency { p50: each, p90: each, p99: each, max: each },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_is_megabytes_per_second_of_processor_time() {
        let found = outcome(RATE, Duration::from_secs(1), Duration::from_millis(500)).expect("an outcome");
        assert!((found.per_second - 250.0).abs() < 1e-9 && (found.latency.p50 - 4_000.0).abs() < 1e-9);
    }

    #[test]
    fn rate_that_was_not_held_is_no_result() {
        assert!(outcome(RATE / 2, Duration::from_secs(1), Duration::from_millis(500)).is_err());
    }
}
