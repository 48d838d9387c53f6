//! The only place that holds a pointer into a packet. Every access states an offset and a header type, and is bounded
//! here; nothing keeps a pointer across a helper call, because helpers that change the packet invalidate it.

use aya_ebpf::programs::TcContext;
use dataplane_common::{net::Header, reason::DropReason};

use crate::skb;

/// Runs `change` on the header at `offset` of the frame, where it lies in the packet.
///
/// Pulls the bytes into the linear part if the device left them in fragments.
///
/// # Errors
/// [`DropReason::Truncated`] if the packet ends before the header does.
#[inline(always)]
pub(crate) fn with_header<T: Header, R>(
    ctx: &TcContext,
    offset: usize,
    change: impl Fn(&mut T) -> R,
) -> Result<R, DropReason> {
    if let Some(header) = header_mut::<T>(ctx, offset) {
        return Ok(change(header));
    }
    skb::pull(ctx, offset + size_of::<T>())?;
    header_mut::<T>(ctx, offset).map(change).ok_or(DropReason::Truncated)
}

/// The header at `offset`, if the linear part holds it whole.
#[expect(clippy::mut_from_ref, reason = "the packet is the kernel's, not a part of `ctx`; see SAFETY")]
#[inline(always)]
fn header_mut<T: Header>(ctx: &TcContext, offset: usize) -> Option<&mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: start..start + size_of::<T>() lies between data and data_end (checked above, and by the verifier); T takes any
    // bytes (`Header`); the verifier refuses the load where the processor cannot make it at the packet's alignment; the reference ends before the next helper call, since only
    // `with_header` holds it, around a closure that has no access to `ctx`.
    Some(unsafe { &mut *(start as *mut T) })
}
