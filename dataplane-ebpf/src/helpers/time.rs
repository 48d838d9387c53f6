//! The clock that flows, affinity and fragments are aged by.

use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use dataplane_common::abi::NodeFlags;

use crate::config;

/// Seconds of `CLOCK_MONOTONIC`. On most kernels as of the last timer tick, which costs no access
/// to a hardware clock.
#[inline(always)]
pub(crate) fn now() -> u32 {
    let now = if config::flag(NodeFlags::COARSE_CLOCK) {
        // SAFETY: no arguments. The verifier does not see the call if the kernel does not have it.
        unsafe { bpf_ktime_get_coarse_ns() }
    } else {
        now_ns()
    };
    (now / 1_000_000_000) as u32
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() }
}
