//! The flow table: records, the index of their tuples, and what is known about free slots.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    btf_maps::{Array, HashMap, PerCpuArray},
    macros::btf_map,
};
use dataplane_common::abi::{CachedNextHop, Flow, FlowBlock, FlowKey, FlowRef, names::capacity};

use crate::helpers::add_atomically;

/// Tuples of flows, in both directions. Written by the datapath.
#[btf_map]
static FLOW_INDEX: HashMap<FlowKey, FlowRef, { 2 * capacity::FLOWS as usize }> = HashMap::new();

/// Flows: state of connections that are translated per packet. Written by the datapath.
#[btf_map]
static FLOWS: Array<Flow, { capacity::FLOWS as usize }> = Array::new();

/// Hints about the slots of `FLOWS`. Written by the datapath.
#[btf_map]
static FLOW_BLOCKS: Array<FlowBlock, { FlowBlock::count(capacity::FLOWS) as usize }> = Array::new();

/// The next hop of each flow and direction. Written by the datapath, not pinned.
#[btf_map]
static FLOW_NEXT_HOPS: Array<CachedNextHop, { 2 * capacity::FLOWS as usize }> = Array::new();

/// The generation of everything that decides next hops. Advanced by the agent.
#[btf_map]
static FORWARDING_GENERATION: Array<u32, 1> = Array::new();

/// For each class of slots, the block from which the next CPU takes some that needs one. Written by
/// the datapath, not pinned.
#[btf_map]
static FLOW_HANDS: Array<u32, { FlowBlock::CLASSES as usize }> = Array::new();

/// Where this CPU looks for a slot. Written by the datapath, not pinned.
#[btf_map]
static FLOW_SEARCH: PerCpuArray<FlowSearch, 1> = PerCpuArray::new();

/// Where a CPU looks for a slot of `FLOWS`.
#[repr(C)]
pub(crate) struct FlowSearch {
    /// For each class, the block that it takes slots from, from 1 on; 0: none yet.
    pub(crate) blocks: [u32; FlowBlock::CLASSES as usize],
    /// For each class, seconds of `CLOCK_MONOTONIC` from which on another search may find a slot.
    pub(crate) due: [u32; FlowBlock::CLASSES as usize],
    /// For each class, blocks that have been looked at since the last slot was found.
    pub(crate) seen: [u32; FlowBlock::CLASSES as usize],
}

#[inline(always)]
pub(crate) fn flow_ref(key: &FlowKey) -> Option<FlowRef> {
    // SAFETY: copied at once; the epoch tells whether it still refers to the same flow.
    unsafe { FLOW_INDEX.get(key) }.copied()
}

/// Inserts the key for `flow`. False if the key exists.
#[inline(always)]
pub(crate) fn claim_flow_key(key: &FlowKey, flow: FlowRef) -> bool {
    FLOW_INDEX.insert(key, flow, BPF_NOEXIST.into()).is_ok()
}

#[inline(always)]
pub(crate) fn set_flow_key(key: &FlowKey, flow: FlowRef) -> bool {
    FLOW_INDEX.insert(key, flow, BPF_ANY.into()).is_ok()
}

/// Removes the key if it refers to `flow`.
#[inline(always)]
pub(crate) fn remove_flow_key(key: &FlowKey, flow: FlowRef) {
    if flow_ref(key) == Some(flow) {
        // removed by another CPU meanwhile: the same result
        let _absent = FLOW_INDEX.remove(key);
    }
}

/// The record of a slot. The program that has taken the slot writes it; others only read it and
/// update state and last-seen time.
#[inline(always)]
pub(crate) fn flow(slot: u32) -> Option<*mut Flow> {
    FLOWS.get_ptr_mut(slot)
}

/// The next hop of a flow in one direction: [`CachedNextHop::index`]. Other CPUs may write it
/// meanwhile.
#[inline(always)]
pub(crate) fn flow_next_hop(index: u32) -> Option<*mut CachedNextHop> {
    FLOW_NEXT_HOPS.get_ptr_mut(index)
}

/// The generation of everything that decides next hops.
#[inline(always)]
pub(crate) fn forwarding_generation() -> u32 {
    // SAFETY: array values live as long as the map; volatile, because the agent changes it.
    FORWARDING_GENERATION.get(0).map_or(0, |generation| unsafe { (&raw const *generation).read_volatile() })
}

/// Hints about a block of slots. Not exact: CPUs may race for them.
#[inline(always)]
pub(crate) fn flow_block(block: u32) -> Option<*mut FlowBlock> {
    FLOW_BLOCKS.get_ptr_mut(block)
}

/// Claims a block, to take one of its slots. False if another CPU has claimed it or is about to.
///
/// An atomic addition without its result is all that Linux 5.10 has. All CPUs see the additions in
/// the same order, so at most one reads 1 behind its own before that one is taken back.
#[inline(always)]
pub(crate) fn claim_flow_block(block: *mut FlowBlock) -> bool {
    // SAFETY: array values live as long as the map.
    let claims = unsafe { &raw mut (*block).claims };
    add_atomically(claims, 1);
    // SAFETY: a live field.
    if unsafe { claims.read_volatile() } == 1 {
        return true;
    }
    add_atomically(claims, u64::MAX);
    false
}

/// Takes back a claim.
#[inline(always)]
pub(crate) fn release_flow_block(block: *mut FlowBlock) {
    // SAFETY: array values live as long as the map.
    add_atomically(unsafe { &raw mut (*block).claims }, u64::MAX);
}

/// The next of `blocks` blocks for a class. CPUs may race for it, and then share one.
#[inline(always)]
pub(crate) fn next_flow_block(class: u32, blocks: u32) -> u32 {
    let Some(hand) = FLOW_HANDS.get_ptr_mut(class) else { return 0 };
    // SAFETY: array values live as long as the map.
    unsafe {
        let block = hand.read_volatile() + 1;
        let block = if block >= blocks { 0 } else { block };
        hand.write_volatile(block);
        block
    }
}

/// This CPU's search for slots.
#[inline(always)]
pub(crate) fn flow_search() -> Option<*mut FlowSearch> {
    FLOW_SEARCH.get_ptr_mut(0)
}
