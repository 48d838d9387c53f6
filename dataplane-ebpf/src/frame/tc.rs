//! The packet at tc: an `sk_buff`.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use dataplane_common::{
    abi::{FlowKey, Port},
    checksum::Change,
    net::Header,
    reason::DropReason,
};

use super::{ChangedIn, ChecksumField, Frame};
use crate::helpers::{
    skb::{self, skb_field},
    socket,
};

impl Frame for TcContext {
    #[inline(always)]
    fn at_tc(&self) -> Option<&TcContext> {
        Some(self)
    }

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn pull(&self, len: usize) -> Result<(), DropReason> {
        // SAFETY: the context is the one the kernel passed; any length is allowed.
        match unsafe { bpf_skb_pull_data(self.skb.skb, len as u32) } {
            0 => Ok(()),
            _ => Err(DropReason::Truncated),
        }
    }

    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Result<T, DropReason> {
        let mut header = core::mem::MaybeUninit::<T>::uninit();
        // SAFETY: the destination has size_of::<T>() writable bytes.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.skb.skb.cast(),
                offset as u32,
                header.as_mut_ptr().cast(),
                size_of::<T>() as u32,
            )
        };
        if result != 0 {
            return Err(DropReason::Truncated);
        }
        // SAFETY: the helper filled all bytes, and any bytes are a `T` (`Header`).
        Ok(unsafe { header.assume_init() })
    }

    #[inline(always)]
    fn write_u16(&self, offset: usize, value: u16) -> Result<(), DropReason> {
        // SAFETY: the source is a live u16.
        match unsafe { bpf_skb_store_bytes(self.skb.skb, offset as u32, (&raw const value).cast(), 2, 0) } {
            0 => Ok(()),
            _ => Err(DropReason::WriteFailed),
        }
    }

    #[inline(always)]
    fn update_checksum(
        &self,
        field: ChecksumField,
        change: Change,
        changed_in: ChangedIn,
    ) -> Result<(), DropReason> {
        let pseudo = match changed_in {
            ChangedIn::PseudoHeader => BPF_F_PSEUDO_HDR,
            ChangedIn::Segment => 0,
        };
        let flags = pseudo | if field.optional { BPF_F_MARK_MANGLED_0 } else { 0 };
        let (offset, difference) = (field.offset as u32, u64::from(change.difference()));
        // SAFETY: the context is the kernel's; a size of 0 in the flags with `from` 0 means that
        // `to` is a difference.
        match unsafe { bpf_l4_csum_replace(self.skb.skb, offset, 0, difference, u64::from(flags)) } {
            0 => Ok(()),
            _ => Err(DropReason::WriteFailed),
        }
    }

    /// `skb->csum`, the device's sum over the whole packet, exists with `CHECKSUM_COMPLETE` only.
    /// The checksum of an IPv4 header cancels what changes in it. IPv6 has none, while the helper
    /// behind `update_checksum` assumes one.
    #[inline(always)]
    fn adjust_skb_csum(&self, change: Change) {
        // SAFETY: the context is the kernel's. Without CHECKSUM_COMPLETE the helper changes nothing
        // and returns an error.
        let _no_checksum_complete = unsafe { bpf_csum_update(self.skb.skb, change.difference()) };
    }

    #[inline(always)]
    fn has_connected_socket(&self, tuple: &FlowKey) -> bool {
        socket::has_connected_socket(self.skb.skb.cast(), tuple)
    }

    #[inline(always)]
    fn has_unconnected_socket(&self, port: Port) -> bool {
        let sk = skb_field!(self, __bindgen_anon_2);
        // SAFETY: the pointer is the union's only field beside its size.
        socket::is_unconnected(unsafe { sk.sk }, port)
    }

    #[inline(always)]
    fn ether_type(&self) -> u16 {
        u16::from_be(skb_field!(self, protocol) as u16)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        skb_field!(self, len)
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        // the number of segments is not counted yet in what a virtual machine or a packet socket
        // sent
        skb::gso_size(self) != 0
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        skb_field!(self, ifindex)
    }
}
