//! The packet a program runs on, at tc or in the driver: what both can do with it, and the only place that holds a pointer
//! into it.
//!
//! Every access states an offset and a header type, and is bounded here; nothing keeps a pointer across a helper call,
//! because helpers that change the packet invalidate it.

use aya_ebpf::EbpfContext;
use dataplane_common::{abi::FlowKey, checksum::Change, net::Header, reason::DropReason};

/// A frame, from its link header on: [`skb`](crate::skb) at tc, [`xdp`](mod@crate::xdp) in the driver.
pub(crate) trait Frame: EbpfContext {
    /// Address of the first byte, and of the one behind the last that can be reached in place.
    fn bounds(&self) -> (usize, usize);

    /// Makes the first `len` bytes reachable in place.
    fn pull(&self, len: usize) -> Result<(), DropReason>;

    /// Copies a header out of the packet, wherever its bytes are.
    fn read<T: Header>(&self, offset: usize) -> Result<T, DropReason>;

    /// Writes two bytes, checksums aside.
    fn write_u16(&self, offset: usize, value: u16) -> Result<(), DropReason>;

    /// Mends a checksum by a change of what it covers.
    fn mend_checksum(&self, field: ChecksumField, change: Change, covers: Covers) -> Result<(), DropReason>;

    /// Tells who may know the sum of the whole packet that its bytes changed so, and no checksum among them made up for it.
    fn account(&self, change: Change);

    /// Whether a segment of this tuple belongs to a socket of this node's own that is past its beginning.
    fn is_of_socket(&self, tuple: &FlowKey) -> bool;

    /// Type of the payload in host order.
    fn ether_type(&self) -> u16;

    /// Length of the frame.
    fn length(&self) -> u32;

    /// Whether it stands for several that will be cut later.
    fn is_gso(&self) -> bool;

    /// Device the program is attached to.
    fn ifindex(&self) -> u32;
}

/// A checksum of a transport header.
#[derive(Clone, Copy)]
pub(crate) struct ChecksumField {
    pub(crate) offset: usize,
    /// 0 stands for none, and stays (UDP, RFC 768). Elsewhere it is a sum like any other.
    pub(crate) optional: bool,
}

impl ChecksumField {
    #[inline(always)]
    pub(crate) const fn at(offset: usize) -> Self {
        Self { offset, optional: false }
    }

    #[inline(always)]
    pub(crate) const fn optional(offset: usize) -> Self {
        Self { offset, optional: true }
    }
}

/// What a change means to the checksum of the transport header.
#[derive(Clone, Copy)]
pub(crate) enum Covers {
    /// Bytes of the pseudo-header changed: also a checksum the device has yet to complete must follow.
    PseudoHeader,
    /// Bytes of the segment itself changed: the device's sum will see them.
    Segment,
}

/// Runs `change` on the header at `offset` of the frame, where it lies in the packet.
///
/// Pulls the bytes into the linear part if the device left them in fragments.
///
/// # Errors
/// [`DropReason::Truncated`] if the packet ends before the header does.
#[inline(always)]
pub(crate) fn with_header<T: Header, R>(
    ctx: &impl Frame,
    offset: usize,
    change: impl Fn(&mut T) -> R,
) -> Result<R, DropReason> {
    if let Some(header) = header_mut::<T>(ctx, offset) {
        return Ok(change(header));
    }
    ctx.pull(offset + size_of::<T>())?;
    header_mut::<T>(ctx, offset).map(change).ok_or(DropReason::Truncated)
}

/// The header at `offset`, if the linear part holds it whole.
#[expect(clippy::mut_from_ref, reason = "the packet is the kernel's, not a part of `ctx`; see SAFETY")]
#[inline(always)]
fn header_mut<T: Header>(ctx: &impl Frame, offset: usize) -> Option<&mut T> {
    let (first, end) = ctx.bounds();
    let start = first + offset;
    if start + size_of::<T>() > end {
        return None;
    }
    // SAFETY: start..start + size_of::<T>() lies between data and data_end (checked above, and by the verifier); T takes any
    // bytes (`Header`); the verifier refuses the load where the processor cannot make it at the packet's alignment; the reference ends before the next helper call, since only
    // `with_header` holds it, around a closure that has no access to `ctx`.
    Some(unsafe { &mut *(start as *mut T) })
}
