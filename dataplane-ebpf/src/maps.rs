//! Every map, and the only way to it.
//!
//! An entry handed out by reference may be given to another key while the program looks at it, because the kernel re-uses
//! the memory of a removed entry at once. Where that matters the entry has an epoch (`FLOWS`) or is copied and has a seal
//! (`SERVICES`); elsewhere a packet that was on its way as its pod went may meet its successor, whose stack refuses it.

use core::{hint::black_box, ptr};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, Queue, RingBuf, SkStorage, lpm_trie::Key},
    helpers::generated::bpf_map_lookup_elem,
    macros::btf_map,
};
use dataplane_common::{
    abi::{
        Addr, Affinity, AffinityKey, BackendSlot, ConnectedPeer, Endpoint, Event, FRAGMENT_SECONDS, Flow,
        FlowHints, FlowKey, FlowRef, FragmentKey, FragmentPorts, HeldKey, OriginKey, Route, Service,
        ServiceKey, SocketOrigin, SourceRange, names::capacity,
    },
    reason::COUNTERS as COUNTER_ENTRIES,
};

use crate::skb;

/// Addresses of this node. Written by the agent; the datapath opens flow_hints.
#[btf_map]
static ENDPOINTS: HashMap<Addr, Endpoint, { capacity::ENDPOINTS as usize }> = HashMap::new();

/// Everything else of the cluster. Written by the agent; the datapath opens flow_hints.
#[btf_map]
static ROUTES: LpmTrie<Addr, Route, { capacity::ROUTES as usize }> = LpmTrie::new();

/// Frontends. Written by the agent.
#[btf_map]
static SERVICES: HashMap<ServiceKey, Service, { capacity::SERVICES as usize }> = HashMap::new();

/// Ranges of backends. Written by the agent.
#[btf_map]
static BACKENDS: Array<BackendSlot, { capacity::BACKENDS as usize }> = Array::new();

/// Generation of each backend number. Written by the agent.
#[btf_map]
static BACKEND_GENERATIONS: Array<u32, { capacity::BACKEND_GENERATIONS as usize }> = Array::new();

/// Tuples of both directions. Written by the datapath.
#[btf_map]
static FLOW_INDEX: HashMap<FlowKey, FlowRef, { 2 * capacity::FLOWS as usize }> = HashMap::new();

/// Translated connections. Written by the datapath.
#[btf_map]
static FLOWS: Array<Flow, { capacity::FLOWS as usize }> = Array::new();

/// Every slot of `FLOWS`, the one used longest ago in front. Filled by the agent, turned by the datapath.
#[btf_map]
static FLOW_SLOTS: Queue<u32, { capacity::FLOWS as usize }> = Queue::new();

/// Ports of packets in pieces. Written by the datapath.
#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, { capacity::FRAGMENTS as usize }> =
    LruHashMap::new();

/// Fragments that came before their first. Written by the datapath.
#[btf_map]
static HELD_FRAGMENTS: LruHashMap<HeldKey, HeldFragment, { capacity::HELD_FRAGMENTS as usize }> =
    LruHashMap::new();

/// Where such a fragment is read to.
#[btf_map]
static HELD_ROOM: PerCpuArray<HeldFragment, 1> = PerCpuArray::new();

/// What connected sockets were connected to. Written by the datapath, freed with the socket.
#[btf_map]
static CONNECTED_ORIGINS: SkStorage<SocketOrigin> = SkStorage::new();

/// Backends of connected UDP sockets. Written by the datapath, which also removes them; the agent ends those whose backend is
/// gone.
#[btf_map]
static CONNECTED_PEERS: HashMap<u64, ConnectedPeer, { capacity::CONNECTED_PEERS as usize }> = HashMap::new();

/// What unconnected sockets sent to. Written by the datapath.
#[btf_map]
static DATAGRAM_ORIGINS: LruHashMap<OriginKey, SocketOrigin, { capacity::DATAGRAM_ORIGINS as usize }> =
    LruHashMap::new();

/// Who may ask which service. Written by the agent.
#[btf_map]
static SOURCE_RANGES: LpmTrie<SourceRange, u32, { capacity::SOURCE_RANGES as usize }> = LpmTrie::new();

/// Which backend a client had last. Written by the datapath.
#[btf_map]
static AFFINITY: LruHashMap<AffinityKey, Affinity, { capacity::AFFINITY as usize }> = LruHashMap::new();

/// Packets by hook and outcome.
#[btf_map]
static COUNTERS: PerCpuArray<u64, { COUNTER_ENTRIES as usize }> = PerCpuArray::new();

/// Room for what does not fit on a stack of 512 bytes.
#[btf_map]
static WORK: PerCpuArray<Work, 1> = PerCpuArray::new();

/// What happened, for people.
#[btf_map]
static EVENTS: RingBuf<Event, { capacity::EVENTS_BYTES as usize }> = RingBuf::new();

/// Tuples at work on one packet. A program of tc has it to itself: softirqs are off while one runs, and none starts another.
#[repr(C)]
pub(crate) struct Work {
    /// Tuple of the packet as it is.
    pub(crate) from: FlowKey,
    /// Tuple it shall have.
    pub(crate) to: FlowKey,
    /// Tuple of the replies of a new flow, as they arrive.
    pub(crate) reply: FlowKey,
    pub(crate) fragment: HeldKey,
    pub(crate) event: Event,
    /// What a new flow is for.
    pub(crate) purpose: Purpose,
    /// How the packet asks, if it asks a frontend.
    pub(crate) asks: Asks,
    /// The frontend's row.
    pub(crate) service: Service,
    /// Not 0: the packet goes to the node of `to` as it is, which is one that serves the frontend as well.
    pub(crate) direct: u32,
    /// What is known of the packet's transport: bits of `parse::Transport`.
    pub(crate) transport: u32,
    /// Not 0: the packet, once translated, bears the node's own address or is addressed to it, as the stack forwards none.
    pub(crate) is_ours: u32,
    /// Of a packet that is too big: the largest IP packet its way takes, in bytes.
    pub(crate) mtu: u32,
    /// Not 0: fragments that come before their first are held here.
    pub(crate) holds: u32,
}

/// A fragment that came before its first: what is behind its link header.
#[repr(C)]
pub(crate) struct HeldFragment {
    /// When it came: seconds of `CLOCK_MONOTONIC`.
    pub(crate) came: u32,
    /// Bytes of it.
    pub(crate) length: u32,
    pub(crate) bytes: [u8; HELD_BYTES],
}

/// Longest fragment that is held: with what is said of it, two KiB.
pub(crate) const HELD_BYTES: usize = 2_040;

/// What a frontend needs to know of who asks, beside the tuple.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Asks {
    /// Not 0: the client is neither a pod nor a process of this node.
    pub(crate) from_outside: u32,
    /// Not 0: the address is one at which node ports are.
    pub(crate) node_ports: u32,
    /// Not 0: the address is another node's, which may have left the answer to this one.
    pub(crate) of_another: u32,
}

/// What a new flow is for.
#[repr(C)]
pub(crate) struct Purpose {
    /// Address the source becomes; unspecified: it stays.
    pub(crate) source: Addr,
    /// 0 for masquerade.
    pub(crate) service_id: u32,
    pub(crate) backend_id: u32,
    pub(crate) backend_generation: u32,
    /// Bits of `FlowFlags`.
    pub(crate) flags: u32,
}

/// This processor's room. It is always there; the verifier wants to hear what happens if it is not.
#[inline(always)]
pub(crate) fn work() -> Option<&'static mut Work> {
    // SAFETY: map values live as long as the map; called once per run (`verdict::classify`), and by whom that reference is lent
    // to (`lend`), so it is the only one in use.
    WORK.get_ptr_mut(0).map(|work| unsafe { &mut *work })
}

/// Runs what looks up this processor's room by itself, which therefore is not the caller's meanwhile.
#[inline(always)]
pub(crate) fn lend<T>(work: &mut Work, borrower: impl FnOnce() -> T) -> T {
    // what has been written is there for it to see, and what it writes is there afterwards
    black_box(&mut *work);
    let result = borrower();
    black_box(&mut *work);
    result
}

#[inline(always)]
pub(crate) fn endpoint(addr: &Addr) -> Option<&'static Endpoint> {
    // SAFETY: memory of the map lives as long as the map; see above for what it may hold.
    unsafe { ENDPOINTS.get(addr) }
}

/// Makes sure that packets of `protocol` to `addr` look for a flow, wherever in the cluster it is.
#[inline(never)]
pub(crate) fn mark_may_have_flows(addr: &Addr, protocol: u8) {
    let flow_hints = match ENDPOINTS.get_ptr_mut(addr) {
        // SAFETY: a live value of the map.
        Some(endpoint) => unsafe { &raw mut (*endpoint).flow_hints },
        None => route_flow_hints(addr),
    };
    // SAFETY: null, or a live value of a map; one byte is written, which nobody ever resets.
    if let Some(flow_hints) = unsafe { flow_hints.as_mut() } {
        flow_hints.set(protocol);
    }
}

/// Null if there is no route. The map's own `get` lends a value that must not be written.
#[inline(always)]
fn route_flow_hints(addr: &Addr) -> *mut FlowHints {
    let key = Key::new(128, *addr);
    // SAFETY: map and key are live, and of the types that belong together.
    let route =
        unsafe { bpf_map_lookup_elem((&raw const ROUTES).cast_mut().cast(), (&raw const key).cast()) };
    if route.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: a live value of the map.
    unsafe { &raw mut (*route.cast::<Route>()).flow_hints }
}

#[inline(always)]
pub(crate) fn route(addr: &Addr) -> Option<&'static Route> {
    ROUTES.get(&Key::new(128, *addr))
}

/// Whether there is such a row.
#[inline(always)]
pub(crate) fn has_service(key: &ServiceKey) -> bool {
    // SAFETY: as in `endpoint`.
    unsafe { SERVICES.get(key) }.is_some()
}

/// Copies a row: whether there is one. What a copy holds that is not sealed may be of several rows: see [`Service::checksum`].
#[inline(always)]
pub(crate) fn copy_service(key: &ServiceKey, copy: &mut Service) -> bool {
    // SAFETY: as in `endpoint`.
    let Some(row) = (unsafe { SERVICES.get(key) }) else { return false };
    // SAFETY: a live value of the map. Volatile, for it may change at any time: nothing may be read from it afterwards.
    *copy = unsafe { ptr::read_volatile(row) };
    true
}

/// Whether a client is in one of the service's ranges.
#[inline(always)]
pub(crate) fn is_source_allowed(service_id: u32, client: &Addr) -> bool {
    SOURCE_RANGES.get(&Key::new(160, SourceRange { service_id, addr: *client })).is_some()
}

#[inline(always)]
pub(crate) fn affinity(key: &AffinityKey) -> Option<Affinity> {
    // SAFETY: copied at once.
    unsafe { AFFINITY.get(key) }.copied()
}

#[inline(always)]
pub(crate) fn remember_affinity(key: &AffinityKey, affinity: Affinity) {
    // not remembered: the client's next connection chooses anew
    let _best_effort = AFFINITY.insert(key, affinity, BPF_ANY.into());
}

#[inline(always)]
pub(crate) fn backend(slot: u32) -> Option<&'static BackendSlot> {
    BACKENDS.get(slot)
}

#[inline(always)]
pub(crate) fn backend_generation(id: u32) -> u32 {
    BACKEND_GENERATIONS.get(id).copied().unwrap_or(0)
}

#[inline(always)]
pub(crate) fn flow_ref(key: &FlowKey) -> Option<FlowRef> {
    // SAFETY: copied at once; the epoch tells whether it still means the flow it meant.
    unsafe { FLOW_INDEX.get(key) }.copied()
}

/// Whether the key was free and now means `flow`.
#[inline(always)]
pub(crate) fn claim_flow_key(key: &FlowKey, flow: FlowRef) -> bool {
    FLOW_INDEX.insert(key, flow, BPF_NOEXIST.into()).is_ok()
}

#[inline(always)]
pub(crate) fn set_flow_key(key: &FlowKey, flow: FlowRef) -> bool {
    FLOW_INDEX.insert(key, flow, BPF_ANY.into()).is_ok()
}

/// Removes the key if it means `flow`.
#[inline(always)]
pub(crate) fn remove_flow_key(key: &FlowKey, flow: FlowRef) {
    if flow_ref(key) == Some(flow) {
        // absent by now: fine, that is what was asked for
        let _absent = FLOW_INDEX.remove(key);
    }
}

/// The record itself. Its owner is whoever took its slot from `FLOW_SLOTS`; others only read it and touch its stamps.
#[inline(always)]
pub(crate) fn flow(slot: u32) -> Option<*mut Flow> {
    FLOWS.get_ptr_mut(slot)
}

/// Takes the slot used longest ago. It belongs to the caller until it is put back.
#[inline(always)]
pub(crate) fn take_flow_slot() -> Option<u32> {
    FLOW_SLOTS.pop().ok().flatten()
}

/// Puts a slot back, as the one used last.
#[inline(always)]
pub(crate) fn put_flow_slot(slot: u32) {
    // there is room for every slot, and this one was taken: it cannot fail
    let _never_full = FLOW_SLOTS.push(slot, 0);
}

/// What the first fragment of a packet said, unless that was another packet, long ago.
#[inline(always)]
pub(crate) fn fragment_ports(key: &FragmentKey) -> Option<FragmentPorts> {
    // SAFETY: copied at once.
    let ports = unsafe { FRAGMENTS.get(key) }.copied()?;
    is_waited_for(ports.came).then_some(ports)
}

/// Whether a packet one fragment of which came then may still become whole.
#[inline(always)]
pub(crate) fn is_waited_for(came: u32) -> bool {
    skb::now().wrapping_sub(came) <= FRAGMENT_SECONDS
}

#[inline(always)]
pub(crate) fn remember_fragment(key: &FragmentKey, ports: FragmentPorts) {
    // not remembered: the later fragments are dropped by name
    let _best_effort = FRAGMENTS.insert(key, ports, BPF_ANY.into());
}

/// Where to read a fragment to that is to be held.
#[inline(always)]
pub(crate) fn held_room() -> Option<&'static mut HeldFragment> {
    // SAFETY: as in `work`; called once per fragment (`stages::held`).
    HELD_ROOM.get_ptr_mut(0).map(|room| unsafe { &mut *room })
}

#[inline(always)]
pub(crate) fn held(key: &HeldKey) -> Option<&'static HeldFragment> {
    // SAFETY: memory of the map lives as long as the map. It may be another fragment's before it is read to its end: who
    // uses it must have removed it afterwards.
    unsafe { HELD_FRAGMENTS.get(key) }
}

/// Whether the key was free and the fragment is held.
#[inline(always)]
pub(crate) fn hold(key: &HeldKey, fragment: &HeldFragment) -> bool {
    HELD_FRAGMENTS.insert(key, fragment, BPF_NOEXIST.into()).is_ok()
}

/// Whether the fragment was held until now.
#[inline(always)]
pub(crate) fn let_go(key: &HeldKey) -> bool {
    HELD_FRAGMENTS.remove(key).is_ok()
}

#[inline(always)]
pub(crate) fn connected_origins() -> &'static SkStorage<SocketOrigin> {
    &CONNECTED_ORIGINS
}

#[inline(always)]
pub(crate) fn remember_peer(cookie: u64, peer: &ConnectedPeer) {
    // not remembered: the socket stays with its backend
    let _best_effort = CONNECTED_PEERS.insert(cookie, peer, BPF_ANY.into());
}

#[inline(always)]
pub(crate) fn forget_peer(cookie: u64) {
    // most sockets were never translated
    let _absent = CONNECTED_PEERS.remove(cookie);
}

#[inline(always)]
pub(crate) fn datagram_origin(key: &OriginKey) -> Option<SocketOrigin> {
    // SAFETY: copied at once.
    unsafe { DATAGRAM_ORIGINS.get(key) }.copied()
}

#[inline(always)]
pub(crate) fn remember_datagram_origin(key: &OriginKey, origin: &SocketOrigin) {
    // not remembered: the application sees the backend's address
    let _best_effort = DATAGRAM_ORIGINS.insert(key, origin, BPF_ANY.into());
}

#[inline(always)]
pub(crate) fn count(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's own value, and programs of one CPU do not interrupt each other.
        unsafe { *counter += 1 };
    }
}

#[inline(always)]
pub(crate) fn events() -> &'static RingBuf<Event, { capacity::EVENTS_BYTES as usize }> {
    &EVENTS
}
