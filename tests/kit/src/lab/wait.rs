//! Waiting for conditions, never for time to pass.

use std::{
    env,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// Makes every deadline so many times longer: for machines that are emulated.
const PATIENCE: &str = "DATAPLANE_PATIENCE";

/// Looks until `condition` gives a value; an error it gave last is the evidence when the deadline passes.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = patient(deadline);
    let end = Instant::now() + deadline;
    loop {
        let last = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= end {
            match last {
                Some(error) => return Err(error.context(format!("{what}: not within {deadline:?}"))),
                None => bail!("{what}: not within {deadline:?}"),
            }
        }
        thread::sleep(INTERVAL);
    }
}

/// The deadline on this machine.
pub(super) fn patient(deadline: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    deadline
        * *FACTOR.get_or_init(|| env::var(PATIENCE).ok().and_then(|factor| factor.parse().ok()).unwrap_or(1))
}
