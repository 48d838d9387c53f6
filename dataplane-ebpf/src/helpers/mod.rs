//! The kernel's BPF helpers, by subject, each with the contract it is used under here. Only these
//! files, `frame/tc.rs` and `maps.rs` call them.

pub(crate) mod fib;
pub(crate) mod random;
pub(crate) mod skb;
pub(crate) mod socket;
pub(crate) mod time;

#[cfg(target_arch = "bpf")]
use core::arch::asm;

/// Address families as the kernel's structures name them.
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// 1 if the number is 0, else 0. By arithmetic: the verifier would follow all code behind a
/// comparison twice.
#[inline(always)]
pub(crate) fn is_zero(number: u32) -> u64 {
    opaque(u64::from(number).wrapping_sub(1)) >> 63
}

/// The same number, hidden from the optimiser.
#[inline(always)]
pub(crate) fn opaque(number: u64) -> u64 {
    // SAFETY: a live local.
    unsafe { (&raw const number).read_volatile() }
}

/// Keeps the branch that it stands in a branch. The optimiser would turn one that only selects a
/// number into arithmetic, whose result the verifiers of Linux 5.10 and 6.1 forget when it is
/// spilled to the stack; a constant they remember.
#[inline(always)]
pub(crate) fn keep_branch() {
    // SAFETY: no instruction at all.
    #[cfg(target_arch = "bpf")]
    unsafe {
        asm!("", options(nomem, nostack));
    }
}

/// Adds to a number in a map, modulo 2^64, with one instruction that no other CPU interrupts
/// (`BPF_XADD`, `BPF_ATOMIC | BPF_ADD` of the instruction set). Rust has no atomic operations for
/// this target.
#[inline(always)]
pub(crate) fn add_atomically(number: *mut u64, addend: u64) {
    // SAFETY: the verifier checks that the number lies in a map, aligned.
    #[cfg(target_arch = "bpf")]
    unsafe {
        asm!(
            "lock *(u64 *)({number} + 0) += {addend}",
            number = in(reg) number,
            addend = in(reg) addend,
            options(nostack),
        );
    }
    // only clippy and rustdoc compile this crate for the host
    #[cfg(not(target_arch = "bpf"))]
    let _ = (number, addend);
}
