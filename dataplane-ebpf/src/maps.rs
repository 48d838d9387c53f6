//! Every map, and the only way to it (but for `scratch`).
//!
//! The kernel re-uses the memory of a removed entry at once, so an entry that is used by reference
//! may belong to another key by then. Where that matters, the entry has an epoch (`FLOWS`) or is
//! copied and has a checksum (`SERVICES`). Elsewhere a packet in flight while its pod is replaced
//! may reach the new pod, whose stack drops it.

mod flows;
mod limits;

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage, lpm_trie::Key},
    helpers::generated::bpf_map_lookup_elem,
    macros::btf_map,
};
use dataplane_common::{
    abi::{
        Addr, Affinity, AffinityKey, AllowedSource, BackendSlot, ConnectedPeer, Device, Endpoint, Event,
        FRAGMENT_TIMEOUT_SECS, FlowHints, FragmentKey, FragmentedPacket, OriginKey, PodSource, Port, PortSet,
        ReorderKey, Route, Service, ServiceKey, SocketOrigin, SourceRange, names::capacity,
    },
    reason::COUNTERS as COUNTER_ENTRIES,
};

pub(crate) use self::{
    flows::{
        claim_flow_block, claim_flow_key, flow, flow_block, flow_next_hop, flow_ref, flow_search,
        forwarding_generation, next_flow_block, release_flow_block, remove_flow_key, set_flow_key,
    },
    limits::{is_neighbour_check_due, spend_client_refusal, spend_refusal},
};
use crate::helpers::time;

/// Flag of hash maps whose memory grows with their entries. Not for maps that packets fill: where
/// maps are charged to the agent's pod, an insertion would fail at the pod's memory limit.
const GROWS: usize = BPF_F_NO_PREALLOC as usize;

/// Addresses of this node. Written by the agent; the datapath sets flow hints.
#[btf_map]
static ENDPOINTS: HashMap<Addr, Endpoint, { capacity::ENDPOINTS as usize }, GROWS> = HashMap::new();

/// The pods' addresses by device. Written by the agent.
#[btf_map]
static POD_SOURCES: Array<PodSource, { capacity::POD_SOURCES as usize }> = Array::new();

/// Devices that carry the node's traffic. Written by the agent.
#[btf_map]
static DEVICES: HashMap<u32, Device, { capacity::DEVICES as usize }, GROWS> = HashMap::new();

/// Sources that pods may use besides their own addresses. Written by the agent.
#[btf_map]
static ALLOWED_SOURCES: LpmTrie<AllowedSource, u32, { capacity::ALLOWED_SOURCES as usize }> = LpmTrie::new();

/// Prefixes of the rest of the cluster. Written by the agent; the datapath sets flow hints.
#[btf_map]
static ROUTES: LpmTrie<Addr, Route, { capacity::ROUTES as usize }> = LpmTrie::new();

/// Frontends of Services. Written by the agent.
#[btf_map]
static SERVICES: HashMap<ServiceKey, Service, { capacity::SERVICES as usize }, GROWS> = HashMap::new();

/// Ports of frontends. Written by the agent.
#[btf_map]
static SERVICE_PORTS: Array<PortChunk, { PortSet::ENTRIES as usize }> = Array::new();

/// Ports of the node's addresses that replies of flows go to. Written by the datapath.
#[btf_map]
static FLOW_PORTS: Array<PortChunk, { PortSet::ENTRIES as usize }> = Array::new();

/// Backends, a contiguous range for each service. Written by the agent.
#[btf_map]
static BACKENDS: Array<BackendSlot, { capacity::BACKENDS as usize }> = Array::new();

/// Generation of each backend number. Written by the agent.
#[btf_map]
static BACKEND_GENERATIONS: Array<u32, { capacity::BACKEND_GENERATIONS as usize }> = Array::new();

/// What the first fragments of packets carried. Written by the datapath.
#[btf_map]
static FRAGMENTED_PACKETS: LruHashMap<FragmentKey, FragmentedPacket, { capacity::FRAGMENTS as usize }> =
    LruHashMap::new();

/// Fragments that arrived before the first one. Written by the datapath, not pinned.
#[btf_map]
static REORDER_FRAGMENTS: LruHashMap<ReorderKey, BufferedFragment, { capacity::REORDER_FRAGMENTS as usize }> =
    LruHashMap::new();

/// Buffer to which such a fragment is copied before it is stored. Not pinned.
#[btf_map]
static REORDER_BUFFER: PerCpuArray<BufferedFragment, 1> = PerCpuArray::new();

/// Frontend and backend of translated connected sockets. Written by the datapath, freed with the
/// socket.
#[btf_map]
static CONNECTED_ORIGINS: SkStorage<SocketOrigin> = SkStorage::new();

/// Backends of connected UDP sockets. Written by the datapath, which removes them with the socket;
/// the agent closes sockets whose backend is gone.
#[btf_map]
static CONNECTED_PEERS: HashMap<u64, ConnectedPeer, { capacity::CONNECTED_PEERS as usize }, GROWS> =
    HashMap::new();

/// Frontends that unconnected sockets sent to. Written by the datapath.
#[btf_map]
static DATAGRAM_ORIGINS: LruHashMap<OriginKey, SocketOrigin, { capacity::DATAGRAM_ORIGINS as usize }> =
    LruHashMap::new();

/// `loadBalancerSourceRanges`. Written by the agent.
#[btf_map]
static SOURCE_RANGES: LpmTrie<SourceRange, u32, { capacity::SOURCE_RANGES as usize }> = LpmTrie::new();

/// Session affinity: the backend a client had last. Written by the datapath.
#[btf_map]
static AFFINITY: LruHashMap<AffinityKey, Affinity, { capacity::AFFINITY as usize }> = LruHashMap::new();

/// Packets by hook and outcome. Written by the datapath.
#[btf_map]
static COUNTERS: PerCpuArray<u64, { COUNTER_ENTRIES as usize }> = PerCpuArray::new();

/// Drops, and with tracing on every packet; read by the agent.
#[btf_map]
static EVENTS: RingBuf<Event, { capacity::EVENTS_BYTES as usize }> = RingBuf::new();

/// A value of `SERVICE_PORTS` and `FLOW_PORTS`.
type PortChunk = [u8; PortSet::CHUNK];

/// A fragment that arrived before the first one: all of it but the Ethernet header.
#[repr(C)]
pub(crate) struct BufferedFragment {
    /// Seconds of `CLOCK_MONOTONIC`.
    pub(crate) received_at: u32,
    /// Bytes used of `bytes`.
    pub(crate) length: u32,
    pub(crate) bytes: [u8; MAX_BUFFERED_BYTES],
}

/// Longest fragment that is stored; makes [`BufferedFragment`] two KiB.
pub(crate) const MAX_BUFFERED_BYTES: usize = 2_040;

#[inline(always)]
pub(crate) fn endpoint(addr: &Addr) -> Option<&'static Endpoint> {
    // SAFETY: memory of the map lives as long as the map; see the module about its reuse.
    unsafe { ENDPOINTS.get(addr) }
}

/// Whether the address is that of the pod behind the device, by its slot: false also for an address
/// that has none.
#[inline(always)]
pub(crate) fn is_pod_source(ifindex: u32, addr: &Addr) -> bool {
    POD_SOURCES
        .get(PodSource::slot(ifindex, addr.is_v4()))
        .is_some_and(|source| source.ifindex == ifindex && source.addr == *addr)
}

/// The row of a device, if it carries the node's traffic and has programs attached.
#[inline(always)]
pub(crate) fn device(ifindex: u32) -> Option<&'static Device> {
    // SAFETY: as in `endpoint`.
    unsafe { DEVICES.get(ifindex) }
}

/// Whether the pod behind the device may use the source besides its own addresses.
#[inline(always)]
pub(crate) fn is_allowed_source(ifindex: u32, source: &Addr) -> bool {
    ALLOWED_SOURCES.get(&Key::new(160, AllowedSource { ifindex, addr: *source })).is_some()
}

/// Sets the flow hint for packets of `protocol` to `addr`, an address of this node or of another;
/// and, for an address of the host, that of the port.
#[inline(never)]
pub(crate) fn mark_may_have_flows(addr: &Addr, protocol: u8, port: Port) {
    let flow_hints = match ENDPOINTS.get_ptr_mut(addr) {
        Some(endpoint) => {
            // SAFETY: a live value of the map.
            if unsafe { (*endpoint).is_host() } {
                mark_port(protocol, port);
            }
            // SAFETY: as above.
            unsafe { &raw mut (*endpoint).flow_hints }
        }
        None => route_flow_hints(addr),
    };
    // SAFETY: null, or a live value of a map; one byte is written, which is never reset.
    if let Some(flow_hints) = unsafe { flow_hints.as_mut() } {
        flow_hints.set(protocol);
    }
}

#[inline(always)]
fn mark_port(protocol: u8, port: Port) {
    let Some(place) = PortSet::place(protocol, port) else { return };
    let Some(chunk) = FLOW_PORTS.get_ptr_mut(place.chunk) else { return };
    // SAFETY: a live value of the map; one byte is written, which is never reset.
    unsafe { (*chunk)[place.byte] = 1 };
}

/// Whether packets to this port of the host may be addressed to a frontend or belong to a flow.
#[inline(always)]
pub(crate) fn is_port_translated(protocol: u8, port: Port) -> bool {
    let Some(place) = PortSet::place(protocol, port) else { return true };
    let of_service = SERVICE_PORTS.get(place.chunk).map_or(1, |chunk| chunk[place.byte]);
    let of_flow = FLOW_PORTS.get(place.chunk).map_or(1, |chunk| chunk[place.byte]);
    of_service | of_flow != 0
}

/// Null if there is no route. Not by the map's own `get`, whose value must not be written.
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

/// Whether the key has a row.
#[inline(always)]
pub(crate) fn has_service(key: &ServiceKey) -> bool {
    // SAFETY: as in `endpoint`.
    unsafe { SERVICES.get(key) }.is_some()
}

/// Flags of a row; 0 without one.
#[inline(always)]
pub(crate) fn service_flags(key: &ServiceKey) -> u32 {
    // SAFETY: as in `endpoint`.
    unsafe { SERVICES.get(key) }.map_or(0, |row| row.flags)
}

/// Copies a row. False if there is none. The copy may be torn: [`Service::is_intact`] tells.
#[inline(always)]
pub(crate) fn copy_service(key: &ServiceKey, copy: &mut Service) -> bool {
    // SAFETY: as in `endpoint`.
    let Some(row) = (unsafe { SERVICES.get(key) }) else { return false };
    // SAFETY: a live value of the map. Volatile, because it may change at any time and must be read
    // once.
    *copy = unsafe { ptr::read_volatile(row) };
    true
}

/// Whether a client is in one of the service's source ranges.
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
pub(crate) fn store_affinity(key: &AffinityKey, affinity: Affinity) {
    // on failure the client's next connection selects a backend again
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

/// What the first fragment of a packet carried. `None` if it has not been seen, or too long ago to
/// be of the same packet.
#[inline(always)]
pub(crate) fn fragmented_packet(key: &FragmentKey) -> Option<&'static mut FragmentedPacket> {
    // SAFETY: memory of the map lives as long as the map. CPUs may race for the counts: then the
    // entry stays until its timeout.
    let packet = unsafe { FRAGMENTED_PACKETS.get_ptr_mut(key)?.as_mut() }?;
    within_fragment_timeout(packet.received_at).then_some(packet)
}

/// Removes what the first fragment carried: its packet is complete.
#[inline(always)]
pub(crate) fn remove_fragmented_packet(key: &FragmentKey) {
    // removed by another CPU meanwhile: the same result
    let _absent = FRAGMENTED_PACKETS.remove(key);
}

/// Whether a packet of which a fragment was received at that time can still be reassembled.
#[inline(always)]
pub(crate) fn within_fragment_timeout(received_at: u32) -> bool {
    time::now().wrapping_sub(received_at) <= FRAGMENT_TIMEOUT_SECS
}

#[inline(always)]
pub(crate) fn store_fragmented_packet(key: &FragmentKey, packet: FragmentedPacket) {
    // on failure the later fragments are dropped (`fragment_unknown`)
    let _best_effort = FRAGMENTED_PACKETS.insert(key, packet, BPF_ANY.into());
}

/// This CPU's buffer for a fragment that is about to be stored.
#[inline(always)]
pub(crate) fn reorder_buffer() -> Option<&'static mut BufferedFragment> {
    // SAFETY: map values live as long as the map; called once per run (`stages::reorder`), so this
    // is the only reference.
    REORDER_BUFFER.get_ptr_mut(0).map(|buffer| unsafe { &mut *buffer })
}

/// The early fragment stored under the key.
#[inline(always)]
pub(crate) fn buffered_fragment(key: &ReorderKey) -> Option<&'static BufferedFragment> {
    // SAFETY: memory of the map lives as long as the map. The entry may be re-used before it is
    // read to its end: what was read is valid only if the caller can remove the entry afterwards.
    unsafe { REORDER_FRAGMENTS.get(key) }
}

/// Stores an early fragment. False if the key exists.
#[inline(always)]
pub(crate) fn buffer_fragment(key: &ReorderKey, fragment: &BufferedFragment) -> bool {
    REORDER_FRAGMENTS.insert(key, fragment, BPF_NOEXIST.into()).is_ok()
}

/// Removes a stored fragment. False if there was none.
#[inline(always)]
pub(crate) fn remove_buffered_fragment(key: &ReorderKey) -> bool {
    REORDER_FRAGMENTS.remove(key).is_ok()
}

#[inline(always)]
pub(crate) fn connected_origins() -> &'static SkStorage<SocketOrigin> {
    &CONNECTED_ORIGINS
}

#[inline(always)]
pub(crate) fn store_peer(cookie: u64, peer: &ConnectedPeer) {
    // on failure the socket keeps its backend when that is gone
    let _best_effort = CONNECTED_PEERS.insert(cookie, peer, BPF_ANY.into());
}

#[inline(always)]
pub(crate) fn remove_peer(cookie: u64) {
    // absent for most sockets, which were never translated
    let _absent = CONNECTED_PEERS.remove(cookie);
}

#[inline(always)]
pub(crate) fn datagram_origin(key: &OriginKey) -> Option<SocketOrigin> {
    // SAFETY: copied at once.
    unsafe { DATAGRAM_ORIGINS.get(key) }.copied()
}

#[inline(always)]
pub(crate) fn store_datagram_origin(key: &OriginKey, origin: &SocketOrigin) {
    // on failure the application sees the backend's address
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
