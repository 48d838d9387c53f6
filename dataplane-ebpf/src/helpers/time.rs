//! The clock that flows, affinity and fragments are aged by.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;

/// Seconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn now() -> u32 {
    (now_ns() / 1_000_000_000) as u32
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}
