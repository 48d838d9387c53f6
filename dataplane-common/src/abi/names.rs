//! Names of maps and programs in the object, and default capacities. This is the only place that
//! spells them.

/// Default capacities of maps, in entries. The agent may set others when it loads the object.
pub mod capacity {
    /// `ENDPOINTS`: pods and addresses of this node.
    pub const ENDPOINTS: u32 = 4_096;
    /// `POD_SOURCES`: two slots for each pod device, a power of two.
    pub const POD_SOURCES: u32 = 2_048;
    /// `DEVICES`: devices that carry the node's traffic.
    pub const DEVICES: u32 = 256;
    /// `ALLOWED_SOURCES`: prefixes of all pods that route for others.
    pub const ALLOWED_SOURCES: u32 = 1_024;
    /// `ROUTES`: prefixes of other nodes (two families, pod CIDRs and node addresses) and
    /// exceptions.
    pub const ROUTES: u32 = 32_768;
    /// `SERVICES`: frontends.
    pub const SERVICES: u32 = 131_072;
    /// `BACKENDS`: slots of all ranges.
    pub const BACKENDS: u32 = 262_144;
    /// `BACKEND_GENERATIONS`: distinct backends of each service port.
    pub const BACKEND_GENERATIONS: u32 = 262_144;
    /// `FLOWS`: translated connections. `FLOW_INDEX` has twice as many entries.
    pub const FLOWS: u32 = 131_072;
    /// `FRAGMENTED_PACKETS`.
    pub const FRAGMENTS: u32 = 4_096;
    /// `REORDER_FRAGMENTS`, two KiB each.
    pub const REORDER_FRAGMENTS: u32 = 512;
    /// `CONNECTED_PEERS`: connected UDP sockets. One that does not fit keeps its backend, even when
    /// that is gone.
    pub const CONNECTED_PEERS: u32 = 32_768;
    /// `DATAGRAM_ORIGINS`.
    pub const DATAGRAM_ORIGINS: u32 = 65_536;
    /// `SOURCE_RANGES`: of all services.
    pub const SOURCE_RANGES: u32 = 16_384;
    /// `AFFINITY`: clients of services with session affinity.
    pub const AFFINITY: u32 = 65_536;
    /// `EVENTS`, bytes, a power of two.
    pub const EVENTS_BYTES: u32 = 1 << 18;
}

/// Maps.
pub mod map {
    /// Hash: `Addr` → `Endpoint`.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Array of `PodSource`, by `PodSource::slot`.
    pub const POD_SOURCES: &str = "POD_SOURCES";
    /// Hash: ifindex (`u32`) → `Device`.
    pub const DEVICES: &str = "DEVICES";
    /// LPM trie: prefix of `AllowedSource` → `u32`, not used.
    pub const ALLOWED_SOURCES: &str = "ALLOWED_SOURCES";
    /// LPM trie: prefix of `Addr` → `Route`.
    pub const ROUTES: &str = "ROUTES";
    /// Hash: `ServiceKey` → `Service`.
    pub const SERVICES: &str = "SERVICES";
    /// Array of `BackendSlot`.
    pub const BACKENDS: &str = "BACKENDS";
    /// Array of `u32`, by backend number.
    pub const BACKEND_GENERATIONS: &str = "BACKEND_GENERATIONS";
    /// Hash: `FlowKey` → `FlowRef`.
    pub const FLOW_INDEX: &str = "FLOW_INDEX";
    /// Array of `Flow`.
    pub const FLOWS: &str = "FLOWS";
    /// Array of `FlowBlock`: hints about 64 slots of `FLOWS` each.
    pub const FLOW_BLOCKS: &str = "FLOW_BLOCKS";
    /// Array of `CachedNextHop`, two for each slot of `FLOWS`. Not pinned: they are found again.
    pub const FLOW_NEXT_HOPS: &str = "FLOW_NEXT_HOPS";
    /// Array of one `u32`: the generation of everything that decides next hops.
    pub const FORWARDING_GENERATION: &str = "FORWARDING_GENERATION";
    /// Array of chunks of `PortSet`: ports of frontends.
    pub const SERVICE_PORTS: &str = "SERVICE_PORTS";
    /// Array of chunks of `PortSet`: ports of the node's addresses that replies of flows go to.
    pub const FLOW_PORTS: &str = "FLOW_PORTS";
    /// LRU hash: `FragmentKey` → `FragmentedPacket`.
    pub const FRAGMENTED_PACKETS: &str = "FRAGMENTED_PACKETS";
    /// LRU hash: `ReorderKey` → 32 bits of time received, 32 of length, the fragment's bytes. Not
    /// pinned: no fragment is worth keeping across a restart of the agent.
    pub const REORDER_FRAGMENTS: &str = "REORDER_FRAGMENTS";
    /// Socket storage of `SocketOrigin`.
    pub const CONNECTED_ORIGINS: &str = "CONNECTED_ORIGINS";
    /// Hash: cookie of a UDP socket → `ConnectedPeer`.
    ///
    /// Not LRU, because the longest-lived sockets matter most. An entry is removed when its socket
    /// is closed.
    pub const CONNECTED_PEERS: &str = "CONNECTED_PEERS";
    /// LRU hash: `OriginKey` → `SocketOrigin`.
    pub const DATAGRAM_ORIGINS: &str = "DATAGRAM_ORIGINS";
    /// LPM trie: prefix of `SourceRange` → `u32`, not used.
    pub const SOURCE_RANGES: &str = "SOURCE_RANGES";
    /// LRU hash: `AffinityKey` → `Affinity`.
    pub const AFFINITY: &str = "AFFINITY";
    /// Per-CPU array of `u64`, index [`crate::reason::counter_index`].
    pub const COUNTERS: &str = "COUNTERS";
    /// Ring buffer of `Event`.
    pub const EVENTS: &str = "EVENTS";
    /// Maps that are pinned, and so outlive the agent, in the order they are pinned.
    pub const PINNED: [&str; 22] = [
        ENDPOINTS,
        POD_SOURCES,
        DEVICES,
        ALLOWED_SOURCES,
        ROUTES,
        SERVICES,
        BACKENDS,
        BACKEND_GENERATIONS,
        FLOW_INDEX,
        FLOWS,
        FLOW_BLOCKS,
        FORWARDING_GENERATION,
        SERVICE_PORTS,
        FLOW_PORTS,
        FRAGMENTED_PACKETS,
        CONNECTED_ORIGINS,
        CONNECTED_PEERS,
        DATAGRAM_ORIGINS,
        SOURCE_RANGES,
        AFFINITY,
        COUNTERS,
        EVENTS,
    ];

    /// Maps that decide next hops: a change of one advances [`FORWARDING_GENERATION`].
    pub const FORWARDING: [&str; 5] = [ENDPOINTS, POD_SOURCES, DEVICES, ALLOWED_SOURCES, ROUTES];

    /// Table versions whose maps this one takes over, with the maps that are new since: layout and
    /// meaning of all others are the same.
    pub const TAKEN_OVER: [(u32, &[&str]); 1] =
        [(6, &[FLOW_BLOCKS, FORWARDING_GENERATION, SERVICE_PORTS, FLOW_PORTS])];
}

/// Programs.
pub mod program {
    /// tc ingress of a pod's host-side device.
    pub const FROM_POD: &str = "from_pod";
    /// tc egress of a pod's host-side device.
    pub const TO_POD: &str = "to_pod";
    /// tc ingress of an uplink.
    pub const FROM_WIRE: &str = "from_wire";
    /// tc egress of an uplink.
    pub const TO_WIRE: &str = "to_wire";
    /// tc ingress of the overlay device.
    pub const FROM_OVERLAY: &str = "from_overlay";
    /// tc egress of the overlay device.
    pub const TO_OVERLAY: &str = "to_overlay";
    /// tc ingress of an uplink without Ethernet header, in front of [`FROM_WIRE`].
    pub const FROM_L3: &str = "from_l3";
    /// tc egress of an uplink without Ethernet header, in front of [`TO_WIRE`].
    pub const TO_L3: &str = "to_l3";
    /// tc egress of an uplink without Ethernet header, behind [`TO_WIRE`].
    pub const LEAVE_L3: &str = "leave_l3";
    /// XDP of an uplink.
    pub const XDP_WIRE: &str = "xdp_wire";
    /// tc programs.
    pub const CLASSIFIERS: [&str; 9] =
        [FROM_POD, TO_POD, FROM_WIRE, TO_WIRE, FROM_OVERLAY, TO_OVERLAY, FROM_L3, TO_L3, LEAVE_L3];
    /// Programs attached to uplinks.
    pub const UPLINK: [&str; 6] = [FROM_WIRE, TO_WIRE, XDP_WIRE, FROM_L3, TO_L3, LEAVE_L3];
    /// Programs attached to devices.
    pub const DEVICE: [&str; 10] =
        [FROM_POD, TO_POD, FROM_WIRE, TO_WIRE, FROM_OVERLAY, TO_OVERLAY, XDP_WIRE, FROM_L3, TO_L3, LEAVE_L3];
    /// Programs attached to the cgroup.
    pub const SOCKET: [&str; 9] = [
        "connect4",
        "connect6",
        "sendmsg4",
        "sendmsg6",
        "recvmsg4",
        "recvmsg6",
        "getpeername4",
        "getpeername6",
        "release",
    ];
}

/// The `.rodata` symbol that holds `NodeConfig`.
pub const NODE: &str = "NODE";

/// The `.data` symbol that holds `NodeVariables`, alone in its section.
pub const NODE_VARIABLES: &str = "NODE_VARIABLES";

/// The map that the loader creates from that section.
pub const DATA: &str = ".data";
