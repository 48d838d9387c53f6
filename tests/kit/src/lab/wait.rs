//! Waits for conditions instead of fixed times.

use std::{
    env,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Interval between two evaluations of a condition.
const INTERVAL: Duration = Duration::from_millis(10);

/// Multiplies every deadline, for emulated machines.
const FACTOR_VARIABLE: &str = "DATAPLANE_TIMEOUT_FACTOR";

/// Evaluates `condition` until it returns a value; after the deadline, fails with its last error.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = scale(deadline);
    let end = Instant::now() + deadline;
    loop {
        let last = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= end {
            match last {
                Some(error) => {
                    return Err(error.context(format!("timed out after {deadline:?} waiting for: {what}")));
                }
                None => bail!("timed out after {deadline:?} waiting for: {what}"),
            }
        }
        thread::sleep(INTERVAL);
    }
}

/// The deadline multiplied for this machine.
pub(super) fn scale(deadline: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    deadline
        * *FACTOR.get_or_init(|| {
            env::var(FACTOR_VARIABLE).ok().and_then(|factor| factor.parse().ok()).unwrap_or(1)
        })
}
