//! What a hook is made of. Each stage does one thing to a packet and may end its path with a named
//! reason.
//!
//! An `inline(never)` function is a BPF subprogram with a stack frame of its own (512 bytes for the
//! whole call chain). It returns one number, so that the verifier does not multiply the paths
//! through it with the paths after it.
//!
//! An `extern "C"` one is a global function: the verifier checks it once, for all callers
//! (Linux 5.6, ADR 0008). Only numbers may be passed to it, so it looks up what it works on by
//! itself ([`with_scratch_released`](crate::scratch::with_scratch_released)).

use dataplane_common::reason::DropReason;

pub(crate) mod affinity;
pub(crate) mod egress;
pub(crate) mod flow;
pub(crate) mod icmp_error;
pub(crate) mod nat;
pub(crate) mod neighbour;
pub(crate) mod on_miss;
pub(crate) mod parse;
pub(crate) mod ping;
pub(crate) mod reject;
pub(crate) mod reorder;
pub(crate) mod rewrite;
pub(crate) mod route;
pub(crate) mod service;
pub(crate) mod source;

/// `Result<bool, DropReason>` in one register, which is all that a subprogram may return (a larger
/// value would be written through a pointer, and the verifier rejects what is left in `r0`).
#[derive(Clone, Copy)]
pub(crate) struct PackedResult(u32);

impl PackedResult {
    const FALSE: u32 = 0;
    const TRUE: u32 = 1;

    /// From what a global function returned.
    #[inline(always)]
    pub(crate) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// For a global function to return.
    #[inline(always)]
    pub(crate) const fn raw(self) -> u32 {
        self.0
    }

    #[inline(always)]
    pub(crate) fn unpack(self) -> Result<bool, DropReason> {
        match self.0 {
            Self::FALSE => Ok(false),
            Self::TRUE => Ok(true),
            reason => Err(DropReason::from_number(reason as u8).unwrap_or(DropReason::WriteFailed)),
        }
    }
}

impl From<Result<bool, DropReason>> for PackedResult {
    #[inline(always)]
    fn from(result: Result<bool, DropReason>) -> Self {
        Self(match result {
            Ok(false) => Self::FALSE,
            Ok(true) => Self::TRUE,
            Err(reason) => u32::from(reason.number()),
        })
    }
}
