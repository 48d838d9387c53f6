//! The packet in the driver, before the kernel has made an `sk_buff` of it.

use aya_ebpf::{EbpfContext as _, programs::XdpContext};
use dataplane_common::{
    abi::FlowKey,
    checksum::Change,
    net::{EthHeader, Header},
    reason::DropReason,
};

use crate::{
    packet::{self, ChecksumField, Covers, Frame},
    skb,
};

/// Nothing is read or written behind this many bytes: to the verifier an offset needs a bound. Far behind the longest
/// headers (14 of Ethernet, 40 of IPv6, 128 x 8 of its extensions, 20 of TCP).
const LAST_OFFSET: usize = 1200;

impl Frame for XdpContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    /// All there is, is in place: a frame in several buffers is not given to a program that does not ask for such.
    #[inline(always)]
    fn pull(&self, _len: usize) -> Result<(), DropReason> {
        Err(DropReason::Truncated)
    }

    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Result<T, DropReason> {
        if offset > LAST_OFFSET {
            return Err(DropReason::Truncated);
        }
        packet::with_header(self, offset, |header: &mut T| *header)
    }

    #[inline(always)]
    fn write_u16(&self, offset: usize, value: u16) -> Result<(), DropReason> {
        if offset > LAST_OFFSET {
            return Err(DropReason::Truncated);
        }
        packet::with_header(self, offset, |field: &mut [u16; 1]| *field = [value])
    }

    /// What comes by a wire is summed up already: there is no device left to complete it.
    #[inline(always)]
    fn mend_checksum(&self, field: ChecksumField, change: Change, _covers: Covers) -> Result<(), DropReason> {
        if field.offset > LAST_OFFSET {
            return Err(DropReason::Truncated);
        }
        packet::with_header(self, field.offset, |[sum]: &mut [u16; 1]| {
            if field.optional {
                if *sum != 0 {
                    let mended = change.apply(*sum);
                    // 0 would say that there is none: the other zero of one's complement
                    *sum = if mended == 0 { u16::MAX } else { mended };
                }
            } else {
                *sum = change.apply(*sum);
            }
        })
    }

    /// Nobody has summed up anything yet.
    #[inline(always)]
    fn account(&self, _change: Change) {}

    #[inline(always)]
    fn is_of_socket(&self, tuple: &FlowKey) -> bool {
        skb::has_socket(self.as_ptr(), tuple)
    }

    #[inline(always)]
    fn ether_type(&self) -> u16 {
        packet::with_header(self, 0, |eth: &mut EthHeader| eth.ether_type()).unwrap_or(0)
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
