//! The packet a program runs on: an Ethernet frame, in an `sk_buff` at tc or in the driver's buffer
//! at XDP.
//!
//! The only place that holds a pointer into a packet. Every access states an offset and a header
//! type and is checked against the frame's bounds here; no pointer is kept across a helper call,
//! because helpers that change the packet invalidate it.

pub(crate) mod family;
pub(crate) mod packet;
mod tc;
mod xdp;

use aya_ebpf::{EbpfContext, programs::TcContext};
use dataplane_common::{
    abi::{FlowKey, Port},
    checksum::Change,
    net::{EthHeader, Header},
    reason::DropReason,
};

/// Offset of the IP header in a frame.
pub(crate) const L3: usize = EthHeader::LEN;

/// A frame, from its Ethernet header on: an `sk_buff` in [`tc`], a driver's buffer in
/// [`xdp`](mod@xdp).
pub(crate) trait Frame: EbpfContext {
    /// The context at tc; `None` at XDP.
    fn at_tc(&self) -> Option<&TcContext>;

    /// Addresses of the first byte and of the end of the linear part.
    fn bounds(&self) -> (usize, usize);

    /// Makes the first `len` bytes linear.
    fn pull(&self, len: usize) -> Result<(), DropReason>;

    /// Copies a header out of the packet, linear or not.
    fn read<T: Header>(&self, offset: usize) -> Result<T, DropReason>;

    /// Writes two bytes, without updating any checksum.
    fn write_u16(&self, offset: usize, value: u16) -> Result<(), DropReason>;

    /// Updates a transport checksum after a change of bytes it covers.
    fn update_checksum(
        &self,
        field: ChecksumField,
        change: Change,
        changed_in: ChangedIn,
    ) -> Result<(), DropReason>;

    /// Adjusts the sum over the whole packet (`CHECKSUM_COMPLETE`) after a change that no checksum
    /// in the packet cancels.
    fn adjust_skb_csum(&self, change: Change);

    /// Whether a TCP segment of this tuple belongs to a socket of the host that is not a listening
    /// one.
    fn has_connected_socket(&self, tuple: &FlowKey) -> bool;

    /// Whether the packet was sent by a socket of the host that has this port and is not connected.
    fn has_unconnected_socket(&self, port: Port) -> bool;

    /// EtherType in host order.
    fn ether_type(&self) -> u16;

    /// Length of the frame in bytes.
    fn length(&self) -> u32;

    /// Whether the frame is a GSO packet: several packets that are segmented later.
    fn is_gso(&self) -> bool;

    /// Device the program is attached to.
    fn ifindex(&self) -> u32;
}

/// Where a transport checksum is.
#[derive(Clone, Copy)]
pub(crate) struct ChecksumField {
    pub(crate) offset: usize,
    /// 0 means "no checksum" and is left alone (UDP, RFC 768). Elsewhere 0 is a checksum like any
    /// other.
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

/// Which bytes a change touched, of those that a transport checksum covers.
#[derive(Clone, Copy)]
pub(crate) enum ChangedIn {
    /// The pseudo-header: also a checksum that the device has yet to complete (`CHECKSUM_PARTIAL`)
    /// must follow.
    PseudoHeader,
    /// The segment itself: a checksum that the device completes will include it anyway.
    Segment,
}

/// Runs `access` on the header at `offset` of the frame, in place. Pulls the bytes into the linear
/// part if needed.
///
/// # Errors
/// [`DropReason::Truncated`] if the packet ends before the header does.
#[inline(always)]
pub(crate) fn with_header<T: Header, R>(
    ctx: &impl Frame,
    offset: usize,
    access: impl Fn(&mut T) -> R,
) -> Result<R, DropReason> {
    if let Some(header) = header_mut::<T>(ctx, offset) {
        return Ok(access(header));
    }
    ctx.pull(offset + size_of::<T>())?;
    header_mut::<T>(ctx, offset).map(access).ok_or(DropReason::Truncated)
}

/// The header at `offset`, if the linear part holds all of it.
#[expect(clippy::mut_from_ref, reason = "the packet is the kernel's, not a part of `ctx`; see SAFETY")]
#[inline(always)]
fn header_mut<T: Header>(ctx: &impl Frame, offset: usize) -> Option<&mut T> {
    let (first, end) = ctx.bounds();
    let start = first + offset;
    if start + size_of::<T>() > end {
        return None;
    }
    // SAFETY: start..start + size_of::<T>() lies between data and data_end (checked above, and by
    // the verifier); any bytes are a valid T (`Header`); the verifier refuses the load where the
    // processor cannot make it at the packet's alignment; the reference ends before the next helper
    // call, since only `with_header` holds it, around a closure that has no access to `ctx`.
    Some(unsafe { &mut *(start as *mut T) })
}
