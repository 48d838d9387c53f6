//! Per-CPU state of one program run: what the stages tell each other about a packet.
//!
//! It does not fit on the 512-byte BPF stack, and a function that the verifier checks on its own
//! cannot be passed a pointer, so it lives in a per-CPU array of one entry. A tc or XDP program has
//! the entry to itself: softirqs are off while one runs, and none calls another. Nothing in it is
//! valid before the stage named beside the field has run, and nothing survives a run on purpose.

use core::hint::black_box;

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
use dataplane_common::abi::{Addr, CachedNextHop, Event, FlowFlags, FlowKey, ReorderKey, Service};

/// The one entry of this CPU.
#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// State of one run. Integers that stand for a `bool` are `u32`, because the kernel does not clear
/// the entry and any bytes must be a valid value.
#[repr(C)]
pub(crate) struct Scratch {
    /// Tuple of the packet as it arrived. Written by `parse::tuple`; by `icmp_error` as the tuple
    /// of the flow that the quoted packet belongs to; by `event` when it reads a packet once more.
    pub(crate) tuple: FlowKey,
    /// Tuple the packet leaves with. Written by `flow::lookup` on a hit and by `flow::create` on a
    /// miss; valid only if `nat::translate` or `nat::find_tuple` returned true.
    pub(crate) nat_tuple: FlowKey,
    /// The flow about to be created. Written by `on_miss`, read by `flow::create`.
    pub(crate) new_flow: NewFlow,
    /// Key of the packet in `FRAGMENTED_PACKETS` and `REORDER_FRAGMENTS`. Written by `parse` for
    /// fragments.
    pub(crate) reorder: Reorder,
    /// Record for the ring buffer `EVENTS`. Written and sent by `event`.
    pub(crate) event: Event,
    /// The ICMP error that the packet becomes. Written by `reject`.
    pub(crate) icmp_error: IcmpError,
    /// From where, and for which kinds of frontends, the packet is looked up. Written by the hook
    /// before `nat`.
    pub(crate) frontend_query: FrontendQuery,
    /// Copy of the frontend's row. Written by `service::lookup_frontend`; valid only if that
    /// returned true.
    pub(crate) service: Service,
    /// The next hop that the packet's flow has cached, or the search for one. Cleared by
    /// `hooks::driver`, written by `flow` and `next_hop`.
    pub(crate) next_hop: NextHopSearch,
    /// How a pod's packet to outside of the cluster leaves the node. Cleared and set by
    /// `egress::find`.
    pub(crate) egress: Egress,
    /// How the translated packet is forwarded. Written by `nat`, read by `route` and `reject`.
    pub(crate) nat: Nat,
    /// Properties of the packet's transport protocol and its TCP flags: bits of `parse::Transport`.
    /// Written by `parse`.
    pub(crate) transport: u32,
}

/// What `nat` found out about the packet beside its tuple.
#[repr(C)]
pub(crate) struct Nat {
    /// The flow's [`FlowFlags`]. Written by `flow`, on hit and on
    /// miss.
    pub(crate) flow_flags: u32,
    /// Not 0: the packet, once translated, has this node's address as its source, or (direct server
    /// return) is still addressed to this node. The stack does not forward such a packet, so it
    /// cannot answer for it either: these programs forward it or send the ICMP error. Cleared by
    /// `nat::translate`, set by `route::check_limits`.
    pub(crate) bypasses_stack: u32,
    /// TTL or hop limit with which the packet arrived. Written by `nat::translate`.
    pub(crate) hop_limit: u32,
    /// MTU of the route to `nat_tuple.dst`, in bytes of IP packet. Written by
    /// `route::check_limits`; valid only if that returned `TooBig`.
    pub(crate) path_mtu: u32,
}

impl Nat {
    /// Whether the packet goes to the node of `nat_tuple` unchanged, and that node translates it
    /// and answers (direct server return).
    #[inline(always)]
    pub(crate) fn is_direct(&self) -> bool {
        self.flow_flags & FlowFlags::DIRECT != 0
    }

    /// Whether it belongs to a connection to a service.
    #[inline(always)]
    pub(crate) fn is_service(&self) -> bool {
        self.flow_flags & FlowFlags::SERVICE != 0
    }

    /// Whether it is a packet of a client outside to the pod itself, or an answer: nothing is
    /// translated.
    #[inline(always)]
    pub(crate) fn is_inbound(&self) -> bool {
        self.flow_flags & FlowFlags::INBOUND != 0
    }

    /// Whether it answers a connection whose own packets take the kernel's stack.
    #[inline(always)]
    pub(crate) fn takes_stack(&self) -> bool {
        self.flow_flags & FlowFlags::STACK != 0
    }
}

/// What to know of a packet, beside its tuple, to find the frontend it is addressed to.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct FrontendQuery {
    /// Not 0: the client is neither a pod nor a process of this node (`externalTrafficPolicy`
    /// applies).
    pub(crate) from_outside: u32,
    /// Not 0: the address is one that serves node ports.
    pub(crate) match_node_ports: u32,
    /// Not 0: the address is another node's, and the packet came from outside: that node may have
    /// sent it on unchanged (direct server return).
    pub(crate) addr_of_other_node: u32,
}

/// The search for the next hop of the packet's flow.
#[repr(C)]
pub(crate) struct NextHopSearch {
    /// Entry of `FLOW_NEXT_HOPS` that the next hop is to be written to, once it is known; or
    /// [`Self::NONE`], [`Self::OPEN`].
    pub(crate) entry: u32,
    /// Epoch of the flow. Valid with an entry.
    pub(crate) epoch: u32,
    /// Generation from before anything that the next hop depends on was read. Valid with an entry.
    pub(crate) generation: u32,
    /// Not 0: the packet's tuple has no flow.
    pub(crate) missed: u32,
    /// The cached next hop. Valid only if `next_hop::find` returned true.
    pub(crate) found: CachedNextHop,
}

impl NextHopSearch {
    /// The next hop is not cached.
    pub(crate) const NONE: u32 = u32::MAX;
    /// No flow of the packet has been looked up yet.
    pub(crate) const OPEN: u32 = u32::MAX - 1;

    /// Whether the next hop is to be cached.
    #[inline(always)]
    pub(crate) const fn is_wanted(&self) -> bool {
        self.entry < Self::OPEN
    }

    /// Whether the packet's flow has been looked up for its next hop.
    #[inline(always)]
    pub(crate) const fn is_searched(&self) -> bool {
        self.entry != Self::NONE
    }

    /// Before a run.
    #[inline(always)]
    pub(crate) const fn clear(&mut self) {
        self.entry = Self::NONE;
        self.missed = 0;
    }
}

/// The next hop of a packet that leaves past the kernel's stack.
#[repr(C)]
pub(crate) struct Egress {
    /// Index of the device; 0: the packet takes the stack.
    pub(crate) ifindex: u32,
    /// Not 0: the packet is masqueraded.
    pub(crate) masquerade: u32,
    pub(crate) next_hop: Addr,
}

/// A flow that does not exist yet.
#[repr(C)]
pub(crate) struct NewFlow {
    /// Tuple of the replies as they arrive here. `flow::create` replaces its destination if the
    /// source is translated.
    pub(crate) reply_tuple: FlowKey,
    /// Address the source is translated to; `::` keeps the source.
    pub(crate) snat_source: Addr,
    /// Number of the service, 0 for masquerade.
    pub(crate) service_id: u32,
    /// Number of the backend, 0 for masquerade.
    pub(crate) backend_id: u32,
    /// Generation of that number, which tells whether the backend still exists.
    pub(crate) backend_generation: u32,
    /// Bits of `FlowFlags`.
    pub(crate) flags: u32,
    /// Not 0: the source port becomes one of the node's range while there is a free one, because
    /// the client's socket may exchange datagrams with the backend without a flow.
    pub(crate) prefers_range_port: u32,
    /// Slot and epoch of the flow that has the tuple and gives it up; epoch 0: there is none.
    /// Written by `flow::lookup` on a miss.
    pub(crate) replaced_slot: u32,
    pub(crate) replaced_epoch: u32,
    /// Its slot and epoch. Written by `flow::create`.
    pub(crate) slot: u32,
    pub(crate) epoch: u32,
    /// The port of the node's range that was tried last, from 0 on, and the distance to the next.
    /// Written by `flow::create`.
    pub(crate) port: u32,
    pub(crate) stride: u32,
}

/// An ICMP error.
#[repr(C)]
pub(crate) struct IcmpError {
    pub(crate) src: Addr,
    pub(crate) dst: Addr,
    /// 0, unless the packet is too big.
    pub(crate) mtu: u32,
    /// Type and code, as they lie in the message.
    pub(crate) kind: u16,
    pub(crate) reserved: u16,
}

/// State of `stages::reorder`.
#[repr(C)]
pub(crate) struct Reorder {
    /// The packet, and a position among its buffered fragments. Its hook is written by
    /// `hooks::driver`.
    pub(crate) key: ReorderKey,
    /// Not 0: this hook buffers fragments that arrive before the first one. Written by
    /// `hooks::driver`.
    pub(crate) enabled: u32,
}

/// This CPU's entry. It always exists; the verifier wants to see what happens if it does not.
#[inline(always)]
pub(crate) fn current() -> Option<&'static mut Scratch> {
    // SAFETY: map values live as long as the map. Called once per run (`hooks::driver`), and by
    // functions that run while that reference is released (`with_scratch_released`), so no other
    // reference is in use.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// Calls a function that looks up [`current`] by itself: the caller's own reference is not used
/// meanwhile.
#[inline(always)]
pub(crate) fn with_scratch_released<T>(scratch: &mut Scratch, callee: impl FnOnce() -> T) -> T {
    // earlier writes must be visible to the callee, and its writes to the caller
    black_box(&mut *scratch);
    let result = callee();
    black_box(&mut *scratch);
    result
}
