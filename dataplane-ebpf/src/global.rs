//! Global functions: the verifier checks each of them once for a program, instead of once for every
//! state in which it is called (Linux 5.6, ADR 0008).
//!
//! They are `extern "C"`, not mangled, and take the context and numbers, because pointers to memory
//! may be passed only from Linux 5.13 on; so they look up [`scratch`] by themselves. They return
//! one number. What a caller has read through a pointer into the packet is void after the call.
//! Each uses all of its arguments: the compiler passes nothing for one that is not used, which the
//! verifier rejects.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use dataplane_common::reason::DropReason;

use crate::scratch::{self, Scratch};

/// `Result<bool, DropReason>` in one register, which is all that a function of a program may return
/// (a larger value would be written through a pointer, and the verifier rejects what is left in
/// `r0`).
#[derive(Clone, Copy)]
pub(crate) struct PackedResult(u32);

impl PackedResult {
    const FALSE: u32 = 0;
    const TRUE: u32 = 1;
    /// A third result, whose meaning caller and function agree on. No [`DropReason`] has it.
    pub(crate) const OTHER: Self = Self(256);

    #[inline(always)]
    pub(crate) const fn is_other(self) -> bool {
        self.0 == Self::OTHER.0
    }

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

impl From<Result<(), DropReason>> for PackedResult {
    #[inline(always)]
    fn from(result: Result<(), DropReason>) -> Self {
        result.map(|()| true).into()
    }
}

impl From<bool> for PackedResult {
    #[inline(always)]
    fn from(result: bool) -> Self {
        Ok::<_, DropReason>(result).into()
    }
}

/// Calls a global function, which looks up the scratch by itself: the caller's own reference is not
/// used meanwhile.
#[inline(always)]
pub(crate) fn call(scratch: &mut Scratch, function: impl FnOnce() -> u32) -> PackedResult {
    PackedResult(scratch::with_scratch_released(scratch, function))
}

/// The body of a global function at tc.
#[inline(always)]
pub(crate) fn run<R: Into<PackedResult>>(
    skb: *mut __sk_buff,
    body: impl FnOnce(&TcContext, &mut Scratch) -> R,
) -> u32 {
    let Some(scratch) = scratch::current() else { return PackedResult::FALSE };
    body(&TcContext::new(skb), scratch).into().raw()
}

/// As [`run`], for a body that does not use the scratch: the caller need not release it.
#[inline(always)]
pub(crate) fn run_without_scratch<R: Into<PackedResult>>(
    skb: *mut __sk_buff,
    body: impl FnOnce(&TcContext) -> R,
) -> u32 {
    body(&TcContext::new(skb)).into().raw()
}

/// Defines pairs of global functions at tc that run a function generic over the family, with
/// [`run`] or [`run_without_scratch`], and for each pair a function that calls the one of the
/// family. Numbers beside the context are passed on to the generic function, behind the scratch.
macro_rules! global_functions {
    ($($call:ident $(($number:ident))?: $v4:ident, $v6:ident = $run:ident($function:ident $(::<$parameter:ty>)?);)+) => {$(
        #[inline(always)]
        pub(super) fn $call<F: crate::frame::family::IpFamily>(
            ctx: &::aya_ebpf::programs::TcContext
            $(, $number: u32)?
        ) -> u32 {
            if F::IS_V4 { $v4(ctx.skb.skb $(, $number)?) } else { $v6(ctx.skb.skb $(, $number)?) }
        }

        crate::global::global_function! { $v4($($number)?) = $run($function, crate::frame::family::V4 $(, $parameter)?) }
        crate::global::global_function! { $v6($($number)?) = $run($function, crate::frame::family::V6 $(, $parameter)?) }
    )+};
}

/// Defines one of a pair.
macro_rules! global_function {
    ($name:ident() = $run:ident($function:ident, $($parameter:ty),+)) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut ::aya_ebpf::bindings::__sk_buff) -> u32 {
            crate::global::$run(skb, $function::<$($parameter),+>)
        }
    };
    ($name:ident($number:ident) = $run:ident($function:ident, $($parameter:ty),+)) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut ::aya_ebpf::bindings::__sk_buff, $number: u32) -> u32 {
            crate::global::$run(skb, |ctx, scratch| $function::<$($parameter),+>(ctx, scratch, $number))
        }
    };
}

pub(crate) use global_function;
pub(crate) use global_functions;
