//! The clock of the programs, which goes on while the model's stands still.

use std::{ops::Range, thread, time::Duration};

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};

/// The second ended while a program ran: nobody knows which one it saw.
#[derive(Debug)]
pub(crate) struct SecondEnded;

impl std::fmt::Display for SecondEnded {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("the second ended while a program ran")
    }
}

impl std::error::Error for SecondEnded {}

/// The second, once these nanoseconds of it have come.
pub(crate) fn second_within(window: &Range<i64>) -> Result<u32> {
    loop {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        if window.contains(&now.tv_nsec()) {
            return Ok(u32::try_from(now.tv_sec())?);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn seconds() -> Result<u32> {
    Ok(u32::try_from(clock_gettime(ClockId::CLOCK_MONOTONIC)?.tv_sec())?)
}
