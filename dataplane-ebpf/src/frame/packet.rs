//! What the IP header of a packet says, for both families.

use core::marker::PhantomData;

use dataplane_common::abi::{Addr, FlowKey, Port};

use super::L3;

/// Fields of the IP header, and where the transport header starts. `F` is the family; what depends
/// on it is in `stages::parse`.
pub(crate) struct Packet<F> {
    pub(crate) src: Addr,
    pub(crate) dst: Addr,
    /// Protocol of the transport header, behind any extension headers.
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// Offset of the transport header in the frame.
    pub(crate) l4: usize,
    pub(crate) fragment: Fragment,
    /// Identification, as it lies in the packet; 0 if this is no fragment of IPv6.
    pub(crate) fragment_id: u32,
    /// Offset in the frame of the header that says which fragment this is.
    pub(crate) fragment_at: usize,
    family: PhantomData<F>,
}

/// Which part of an IP packet this is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragment {
    /// All of it.
    Whole,
    /// The first fragment, with the transport header.
    First,
    /// A later fragment, without it.
    Later,
}

/// Which bytes of the fragmented part of a packet a fragment carries.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    pub(crate) offset: u32,
    pub(crate) length: u32,
    /// No fragment comes behind it.
    pub(crate) is_last: bool,
}

impl<F> Packet<F> {
    #[inline(always)]
    pub(crate) const fn new(
        src: Addr,
        dst: Addr,
        protocol: u8,
        hop_limit: u8,
        l4: usize,
        fragment: Fragment,
        fragment_id: u32,
    ) -> Self {
        let (fragment_at, family) = (L3, PhantomData);
        Self { src, dst, protocol, hop_limit, l4, fragment, fragment_id, fragment_at, family }
    }

    /// Its tuple, with zeros for the ports.
    #[inline(always)]
    pub(crate) const fn tuple_without_ports(&self) -> FlowKey {
        FlowKey::new(self.protocol, self.src, Port::new(0), self.dst, Port::new(0))
    }

    /// Whether it begins with the transport header.
    #[inline(always)]
    pub(crate) fn has_transport(&self) -> bool {
        self.fragment != Fragment::Later
    }
}
