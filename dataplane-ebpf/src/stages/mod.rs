//! What a hook is made of. Each stage does one thing to a packet and may end its path with a named reason.
//!
//! What is outlined (`inline(never)`) is a function of its own to the verifier: packets that do not need it do not pay for
//! it, its stack is its own, and what it decides reaches the caller as one number, so that the paths through it do not
//! multiply with the paths after it.
//!
//! Some (`extern "C"`) even stand by themselves: the verifier walks them once, whoever calls them (Linux 5.6). Numbers are all that
//! may enter such a function, so it looks up what it works on ([`maps::lend`](crate::maps::lend)).

use dataplane_common::reason::DropReason;

pub(crate) mod affinity;
pub(crate) mod flow;
pub(crate) mod held;
pub(crate) mod icmp_error;
pub(crate) mod masquerade;
pub(crate) mod parse;
pub(crate) mod reject;
pub(crate) mod rewrite;
pub(crate) mod route;
pub(crate) mod service;
pub(crate) mod translate;

/// The same number, of which the compiler knows nothing.
#[inline(always)]
pub(crate) fn opaque(number: u64) -> u64 {
    // SAFETY: a live local.
    unsafe { (&raw const number).read_volatile() }
}

/// `Result<bool, DropReason>` as one register: such a function may return nothing else (a larger value would be written
/// through a pointer, and the verifier refuses what is left in `r0`).
#[derive(Clone, Copy)]
pub(crate) struct Answer(u32);

impl Answer {
    const NO: u32 = 0;
    const YES: u32 = 1;

    /// As a function that stands by itself returns it.
    #[inline(always)]
    pub(crate) const fn from_number(number: u32) -> Self {
        Self(number)
    }

    #[inline(always)]
    pub(crate) const fn number(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub(crate) fn get(self) -> Result<bool, DropReason> {
        match self.0 {
            Self::NO => Ok(false),
            Self::YES => Ok(true),
            reason => Err(DropReason::from_number(reason as u8).unwrap_or(DropReason::WriteFailed)),
        }
    }
}

impl From<Result<bool, DropReason>> for Answer {
    #[inline(always)]
    fn from(result: Result<bool, DropReason>) -> Self {
        Self(match result {
            Ok(false) => Self::NO,
            Ok(true) => Self::YES,
            Err(reason) => u32::from(reason.number()),
        })
    }
}
