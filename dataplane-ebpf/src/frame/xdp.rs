//! The packet at XDP: a frame in the driver's buffer, before the kernel allocates an `sk_buff`.

use aya_ebpf::{
    EbpfContext as _,
    programs::{TcContext, XdpContext},
};
use dataplane_common::{
    abi::{FlowKey, Port},
    checksum::Change,
    net::{EthHeader, Header},
    reason::DropReason,
};

use super::{ChangedIn, ChecksumField, Frame, with_header};
use crate::helpers::socket;

/// Highest offset that is read or written, because the verifier demands a bound. The longest
/// headers end before it (14 bytes of Ethernet, 40 of IPv6, 128 x 8 of its extensions, 20 of TCP).
const MAX_OFFSET: usize = 1200;

impl Frame for XdpContext {
    #[inline(always)]
    fn at_tc(&self) -> Option<&TcContext> {
        None
    }

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    /// Nothing to pull: the whole frame is linear, because this program does not declare support
    /// for XDP multi-buffer.
    #[inline(always)]
    fn pull(&self, _len: usize) -> Result<(), DropReason> {
        Err(DropReason::Truncated)
    }

    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Result<T, DropReason> {
        if offset > MAX_OFFSET {
            return Err(DropReason::Truncated);
        }
        with_header(self, offset, |header: &mut T| *header)
    }

    #[inline(always)]
    fn write_u16(&self, offset: usize, value: u16) -> Result<(), DropReason> {
        if offset > MAX_OFFSET {
            return Err(DropReason::Truncated);
        }
        with_header(self, offset, |field: &mut [u16; 1]| *field = [value])
    }

    /// Checksums of received frames are complete, so both kinds of change are applied in full.
    #[inline(always)]
    fn update_checksum(
        &self,
        field: ChecksumField,
        change: Change,
        _changed_in: ChangedIn,
    ) -> Result<(), DropReason> {
        if field.offset > MAX_OFFSET {
            return Err(DropReason::Truncated);
        }
        with_header(self, field.offset, |[sum]: &mut [u16; 1]| {
            if field.optional {
                if *sum != 0 {
                    let updated = change.apply(*sum);
                    // 0 would mean "no checksum": write the other zero of one's complement
                    *sum = if updated == 0 { u16::MAX } else { updated };
                }
            } else {
                *sum = change.apply(*sum);
            }
        })
    }

    /// There is no `sk_buff` yet, and so no `skb->csum`.
    #[inline(always)]
    fn adjust_skb_csum(&self, _change: Change) {}

    #[inline(always)]
    fn has_connected_socket(&self, tuple: &FlowKey) -> bool {
        socket::has_connected_socket(self.as_ptr(), tuple)
    }

    /// XDP sees packets that arrive.
    #[inline(always)]
    fn has_unconnected_socket(&self, _port: Port) -> bool {
        false
    }

    #[inline(always)]
    fn ether_type(&self) -> u16 {
        with_header(self, 0, |eth: &mut EthHeader| eth.ether_type()).unwrap_or(0)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        (self.data_end() - self.data()) as u32
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        false
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ingress_ifindex() as u32
    }
}
