//! Random numbers, for the choice of a backend and of a source port.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;

/// A pseudo-random number, not fit for cryptography.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_get_prandom_u32() }
}
