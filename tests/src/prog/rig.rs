//! A datapath of its own for one test: the agent's object, small maps, no pins, nothing attached.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions,
    maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuArray, Queue, RingBuf, lpm_trie::Key},
    programs::{Program, SchedClassifier, Xdp},
};
use dataplane_common::{
    abi::{
        Addr, BackendSlot, Endpoint, Event, Flow, FlowFlags, FlowKey, FlowRef, FragmentKey, FragmentPorts,
        MacAddr, NodeAddresses, NodeConfig, NodeFlags, Port, ReorderKey, Route, RouteKind, Scope, Service,
        ServiceKey, SourceRange,
        names::{self, map},
    },
    reason::{self, HookId, Outcome},
};

use super::frame::{HOST_MAC, OVERLAY_MAC, Parsed};
use crate::sys_bpf::{TestRun, sums_of_array};

/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE`.
const SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;

/// Flows the table of a rig holds.
pub const FLOWS: u32 = 64;

/// What the kernel is told to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Next program, then on its way.
    Next,
    Drop,
    Redirect,
    /// Out of the device it came by, from its driver.
    TurnRound,
}

/// What became of a packet.
#[derive(Clone, Debug)]
pub struct Run {
    pub action: Action,
    /// Name of the verdict or drop reason: the one counter that moved.
    pub outcome: &'static str,
    pub frame: Vec<u8>,
}

impl Run {
    /// The packet that came out.
    ///
    /// # Panics
    /// If a length or checksum of it is wrong.
    pub fn packet(&self) -> Parsed {
        match Parsed::read(&self.frame) {
            Ok(parsed) => parsed,
            Err(problem) => panic!("{problem} in {:02x?}", self.frame),
        }
    }
}

/// A node with everything switched on.
pub fn node_config() -> NodeConfig {
    NodeConfig {
        host_mac: MacAddr::new(HOST_MAC),
        overlay_mac: MacAddr::new(OVERLAY_MAC),
        overlay_vni: 1,
        snat_first: Port::new(61_000),
        snat_last: Port::new(61_999),
        flow_slots: FLOWS,
        flags: NodeFlags::CONNECT_TCP | NodeFlags::CONNECT_UDP | NodeFlags::MASQUERADE,
        flow_probes: 8,
        host_netns: [0; 8],
    }
}

/// The loaded datapath and its tables.
pub struct Rig {
    ebpf: Ebpf,
    /// A program is loaded when a test first runs it: the verifier takes most of a test's time.
    loaded: Vec<HookId>,
    /// Device a packet in the driver comes by: 1 is a namespace's loopback.
    pub ifindex: u32,
}

impl Rig {
    /// Loads the datapath for a node with these addresses.
    pub fn new(node: &NodeConfig, ipv4: IpAddr, ipv6: IpAddr) -> Result<Self> {
        // cluster IPs may be anywhere
        let addresses = NodeAddresses { ipv4: ipv4.into(), ipv6: ipv6.into(), ..NodeAddresses::default() };
        Self::with_config(node, &addresses)
    }

    /// Loads the datapath with this configuration.
    pub fn with_config(node: &NodeConfig, addresses: &NodeAddresses) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        loader
            .override_global(names::NODE, node, true)
            .override_global(names::NODE_ADDRESSES, addresses, true)
            .override_global("AYA_LOG_LEVEL", &0_u8, false);
        for (name, entries) in [
            (map::ENDPOINTS, 64),
            (map::ROUTES, 64),
            (map::SERVICES, 128),
            (map::BACKENDS, 512),
            (map::BACKEND_GENERATIONS, 512),
            (map::FLOWS, FLOWS),
            (map::FLOW_SLOTS, FLOWS),
            (map::FLOW_INDEX, 2 * FLOWS),
            (map::FRAGMENTS, 64),
            (map::REORDER_FRAGMENTS, 64),
            (map::DATAGRAM_ORIGINS, 64),
            (map::SOURCE_RANGES, 64),
            (map::AFFINITY, 64),
            (map::EVENTS, 4_096),
        ] {
            loader.map_max_entries(name, entries);
        }
        let mut ebpf = loader.load(dataplane_agent::datapath::OBJECT).context("load the object")?;
        let mut slots: Queue<&mut MapData, u32> =
            Queue::try_from(ebpf.map_mut(map::FLOW_SLOTS).context("FLOW_SLOTS")?)?;
        for slot in 0..node.flow_slots {
            slots.push(slot, 0)?;
        }
        Ok(Self { ebpf, loaded: Vec::new(), ifindex: 1 })
    }

    /// Runs the program of `hook` on a frame.
    pub fn run(&mut self, hook: HookId, frame: &[u8]) -> Result<Run> {
        self.load(hook)?;
        let before = self.counters()?;
        // a fragment may become a larger one
        let mut out = vec![0; frame.len() + 2_048];
        let mut options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
        let (result, actions): (_, &[(i32, Action)]) = if hook == HookId::XdpWire {
            // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
            let context = [0, frame.len() as u32, 0, self.ifindex, 0, 0].map(u32::to_ne_bytes).concat();
            options.ctx_in = Some(&context);
            let program: &mut Xdp = self.ebpf.program_mut(hook.name()).context(hook.name())?.try_into()?;
            let actions = &[(1, Action::Drop), (2, Action::Next), (3, Action::TurnRound)];
            (program.test_run(options)?, actions)
        } else {
            let program: &mut SchedClassifier =
                self.ebpf.program_mut(hook.name()).context(hook.name())?.try_into()?;
            (program.test_run(options)?, &[(-1, Action::Next), (2, Action::Drop), (7, Action::Redirect)])
        };
        out.truncate(result.data_size_out as usize);
        let after = self.counters()?;
        let moved: Vec<usize> = (0..before.len()).filter(|index| before[*index] != after[*index]).collect();
        ensure!(
            moved.len() == 1 && after[moved[0]] == before[moved[0]] + 1,
            "one counter moves by one: {moved:?}"
        );
        ensure!(moved[0] as u32 / reason::OUTCOMES == hook as u32, "the counter is the hook's own");
        let outcome =
            Outcome::from_number((moved[0] as u32 % reason::OUTCOMES) as u8).context("known outcome")?;
        let returned = result.return_value as i32;
        let action = actions.iter().find(|(number, _)| *number == returned);
        let (_, action) = *action.with_context(|| format!("unknown action {returned}"))?;
        Ok(Run { action, outcome: outcome.name(), frame: out })
    }

    /// As [`Self::run`], of a packet whose sum the device has computed: whether the kernel can check it (Linux 6.16).
    ///
    /// # Errors
    /// If the sum the kernel keeps is not that of the packet that comes out.
    pub fn run_summed_up(&mut self, hook: HookId, frame: &[u8]) -> Result<bool> {
        self.load(hook)?;
        let program: &mut SchedClassifier =
            self.ebpf.program_mut(hook.name()).context(hook.name())?.try_into()?;
        let run = TestRun { repeat: 1, flags: SKB_CHECKSUM_COMPLETE, batch_size: 0 };
        match run.run(program.fd()?.as_fd(), frame) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("{} on a packet that is summed up", hook.name()))
            }
        }
    }

    /// The last of what the programs reported since this was asked before.
    pub fn last_event(&mut self) -> Result<Option<Event>> {
        let mut ring = RingBuf::try_from(self.ebpf.map_mut(map::EVENTS).context("EVENTS")?)?;
        let mut last = None;
        while let Some(record) = ring.next() {
            last = Some(Event::from_bytes(&record).context("a record of another size")?);
        }
        Ok(last)
    }

    fn load(&mut self, hook: HookId) -> Result<()> {
        if !self.loaded.contains(&hook) {
            let loaded = match self.ebpf.program_mut(hook.name()).context(hook.name())? {
                Program::SchedClassifier(program) => program.load(),
                Program::Xdp(program) => program.load(),
                _ => anyhow::bail!("{} is of an unexpected type", hook.name()),
            };
            loaded.with_context(|| format!("load {}", hook.name()))?;
            self.loaded.push(hook);
        }
        Ok(())
    }

    fn counters(&self) -> Result<Vec<u64>> {
        let counters = self.ebpf.map(map::COUNTERS).context("COUNTERS")?;
        if let Map::PerCpuArray(data) = counters
            && let Ok(sums) = sums_of_array(data.fd().as_fd(), reason::COUNTERS)
        {
            return Ok(sums);
        }
        // before Linux 5.13 one by one
        let counters: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(counters)?;
        (0..reason::COUNTERS).map(|index| Ok(counters.get(&index, 0)?.iter().sum())).collect()
    }

    fn hash<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        Ok(HashMap::try_from(self.ebpf.map_mut(name).context(name.to_owned())?)?)
    }

    fn array<V: aya::Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, V>> {
        Ok(Array::try_from(self.ebpf.map_mut(name).context(name.to_owned())?)?)
    }

    pub fn pod(&mut self, addr: IpAddr, ifindex: u32, mac: [u8; 6]) -> Result<()> {
        let endpoint = Endpoint::pod(ifindex, MacAddr::new(mac));
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), endpoint, 0)?)
    }

    pub fn host(&mut self, addr: IpAddr) -> Result<()> {
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), Endpoint::host(), 0)?)
    }

    /// An address of the host with frontends at it, as the agent writes it.
    pub fn host_with_frontends(&mut self, addr: IpAddr) -> Result<()> {
        let endpoint = Endpoint::host().with_frontends().with_all_flow_hints();
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), endpoint, 0)?)
    }

    pub fn remove_endpoint(&mut self, addr: IpAddr) -> Result<()> {
        Ok(self.hash::<Addr, Endpoint>(map::ENDPOINTS)?.remove(&Addr::from(addr))?)
    }

    /// Whether packets of `protocol` to `addr` look for a flow.
    pub fn gate_open(&mut self, addr: IpAddr, protocol: u8) -> Result<bool> {
        Ok(self
            .hash::<Addr, Endpoint>(map::ENDPOINTS)?
            .get(&addr.into(), 0)?
            .flow_hints
            .may_have_flow(protocol))
    }

    /// `prefix` is written for its own family.
    pub fn route(
        &mut self,
        prefix: (IpAddr, u32),
        kind: RouteKind,
        next_hop: Option<IpAddr>,
        mtu: u32,
    ) -> Result<()> {
        let bits = if prefix.0.is_ipv4() { prefix.1 + Addr::V4_PREFIX_BITS } else { prefix.1 };
        let ifindex = if kind == RouteKind::Overlay { 5 } else { 2 };
        let route = Route {
            next_hop: next_hop.map_or(Addr::UNSPECIFIED, Addr::from),
            ifindex,
            kind: kind as u32,
            mtu,
            ..Route::default()
        };
        let mut routes: LpmTrie<&mut MapData, Addr, Route> =
            LpmTrie::try_from(self.ebpf.map_mut(map::ROUTES).context("ROUTES")?)?;
        Ok(routes.insert(&Key::new(bits, prefix.0.into()), route, 0)?)
    }

    /// An address of the host at which node ports are, as the agent writes it.
    pub fn host_with_node_ports(&mut self, addr: IpAddr) -> Result<()> {
        let endpoint = Endpoint::host().with_node_ports().with_all_flow_hints();
        Ok(self.hash(map::ENDPOINTS)?.insert(Addr::from(addr), endpoint, 0)?)
    }

    /// Lets clients of this range ask the service of this number.
    pub fn allow(&mut self, service_id: u32, range: (IpAddr, u32)) -> Result<()> {
        let bits = if range.0.is_ipv4() { range.1 + Addr::V4_PREFIX_BITS } else { range.1 };
        let key = Key::new(32 + bits, SourceRange { service_id, addr: range.0.into() });
        let mut ranges: LpmTrie<&mut MapData, SourceRange, u32> =
            LpmTrie::try_from(self.ebpf.map_mut(map::SOURCE_RANGES).context("SOURCE_RANGES")?)?;
        Ok(ranges.insert(&key, 1, 0)?)
    }

    /// A service whose backends take the slots from `first_slot` on, each with its slot as its number.
    pub fn service(
        &mut self,
        frontend: SocketAddr,
        protocol: u8,
        first_slot: u32,
        backends: &[SocketAddr],
        flags: u32,
    ) -> Result<()> {
        self.service_with(frontend, protocol, first_slot, backends, |_, service| service.flags = flags)
    }

    /// As [`Self::service`], with whatever else its row says.
    pub fn service_with(
        &mut self,
        frontend: SocketAddr,
        protocol: u8,
        first_slot: u32,
        backends: &[SocketAddr],
        change: impl FnOnce(&mut ServiceKey, &mut Service),
    ) -> Result<()> {
        for (slot, backend) in (first_slot..).zip(backends) {
            let generation = self.array::<u32>(map::BACKEND_GENERATIONS)?.get(&slot, 0)?;
            let entry = BackendSlot {
                addr: backend.ip().into(),
                id: slot,
                generation,
                port: Port::new(backend.port()),
                reserved: 0,
            };
            self.array(map::BACKENDS)?.set(slot, entry, 0)?;
        }
        let mut key = frontend_key(frontend, protocol);
        let mut service = Service {
            id: first_slot + 1,
            first_slot,
            count: backends.len() as u32,
            affinity_timeout: 0,
            generation: 1,
            flags: 0,
            checksum: 0,
        };
        change(&mut key, &mut service);
        Ok(self.hash(map::SERVICES)?.insert(key, service.with_checksum(&key), 0)?)
    }

    /// The row of a frontend, as it is.
    pub fn service_row(&mut self, frontend: SocketAddr, protocol: u8) -> Result<Service> {
        Ok(self.hash(map::SERVICES)?.get(&frontend_key(frontend, protocol), 0)?)
    }

    /// Writes the row of a frontend, with whatever seal it has.
    pub fn put_service_row(&mut self, frontend: SocketAddr, protocol: u8, row: Service) -> Result<()> {
        Ok(self.hash(map::SERVICES)?.insert(frontend_key(frontend, protocol), row, 0)?)
    }

    /// Says that the address is a cluster IP.
    pub fn cluster_ip(&mut self, addr: IpAddr) -> Result<()> {
        let key = ServiceKey::of_address(addr.into());
        Ok(self.hash(map::SERVICES)?.insert(key, Service::default().with_checksum(&key), 0)?)
    }

    /// Makes flows to the backend stale, as the agent does when it is gone.
    pub fn raise_generation(&mut self, backend: u32) -> Result<()> {
        let mut generations = self.array::<u32>(map::BACKEND_GENERATIONS)?;
        let generation = generations.get(&backend, 0)?;
        Ok(generations.set(backend, generation + 1, 0)?)
    }

    /// Every flow, each led to by both of its tuples; a direct one by its forward tuple.
    ///
    /// # Errors
    /// Also if half a pair is found: a tuple without its flow, or a flow with one tuple.
    pub fn flows(&mut self) -> Result<Vec<Flow>> {
        let index: Vec<(FlowKey, FlowRef)> =
            self.hash::<FlowKey, FlowRef>(map::FLOW_INDEX)?.iter().collect::<Result<_, _>>()?;
        let mut flows = Vec::new();
        for (key, reference) in &index {
            let flow: Flow = self.array(map::FLOWS)?.get(&reference.slot, 0)?;
            ensure!(flow.epoch == reference.epoch, "{key:?} leads to a flow of another epoch");
            ensure!(flow.forward == *key || flow.reply == *key, "{key:?} leads to a flow it is no part of");
            if flow.forward == *key {
                // answers to what went on directly pass another node
                let is_direct = flow.flags & FlowFlags::DIRECT != 0;
                let has_way_back = index.iter().any(|(other, _)| *other == flow.reply);
                ensure!(is_direct != has_way_back, "{key:?} has no way back, or one it must not have");
                flows.push(flow);
            } else {
                // or the forward tuple belongs to a successor: a connection that re-used the ports, or moved to
                // another backend, while the replies of its predecessor are still restored
                ensure!(index.iter().any(|(other, _)| *other == flow.forward), "{key:?} has no way forth");
            }
        }
        Ok(flows)
    }

    /// Which fragments are held for their first.
    pub fn held(&mut self) -> Result<Vec<ReorderKey>> {
        // of the value only its size matters
        let held = self.hash::<ReorderKey, [u32; 512]>(map::REORDER_FRAGMENTS)?;
        Ok(held.keys().collect::<Result<_, _>>()?)
    }

    /// As if every fragment had come so many seconds earlier.
    pub fn age_fragments(&mut self, seconds: u32) -> Result<()> {
        let mut firsts = self.hash::<FragmentKey, FragmentPorts>(map::FRAGMENTS)?;
        let entries: Vec<_> = firsts.iter().collect::<Result<_, _>>()?;
        for (key, ports) in entries {
            firsts.insert(
                key,
                FragmentPorts { received_at: ports.received_at.wrapping_sub(seconds), ..ports },
                0,
            )?;
        }
        let mut held = self.hash::<ReorderKey, [u32; 512]>(map::REORDER_FRAGMENTS)?;
        let entries: Vec<_> = held.iter().collect::<Result<_, _>>()?;
        for (key, mut fragment) in entries {
            fragment[0] = fragment[0].wrapping_sub(seconds);
            held.insert(key, fragment, 0)?;
        }
        Ok(())
    }

    /// Replies of this tuple are claimed by a processor that has not yet written their flow.
    pub fn claim_as_if_at_work(&mut self, src: SocketAddr, dst: SocketAddr, protocol: u8) -> Result<()> {
        // the one that is used last
        let slot = FLOWS - 1;
        self.array(map::FLOWS)?.set(slot, Flow { epoch: 1, ..Flow::default() }, 0)?;
        Ok(self.hash(map::FLOW_INDEX)?.insert(tuple(src, dst, protocol), FlowRef { slot, epoch: 2 }, 0)?)
    }

    /// The flow of packets of this tuple.
    pub fn flow_of(&mut self, src: SocketAddr, dst: SocketAddr, protocol: u8) -> Result<Flow> {
        let key = tuple(src, dst, protocol);
        let reference = self.hash::<FlowKey, FlowRef>(map::FLOW_INDEX)?.get(&key, 0)?;
        Ok(self.array(map::FLOWS)?.get(&reference.slot, 0)?)
    }

    /// Changes the stamps and the state of every flow, as time would.
    pub fn age_flows(&mut self, change: impl Fn(&mut Flow)) -> Result<()> {
        let mut flows = self.array::<Flow>(map::FLOWS)?;
        for slot in 0..FLOWS {
            let mut flow = flows.get(&slot, 0)?;
            if flow.epoch != 0 {
                change(&mut flow);
                flows.set(slot, flow, 0)?;
            }
        }
        Ok(())
    }
}

fn frontend_key(frontend: SocketAddr, protocol: u8) -> ServiceKey {
    ServiceKey {
        addr: frontend.ip().into(),
        port: Port::new(frontend.port()),
        protocol,
        scope: Scope::Any as u8,
    }
}

/// As the flow table's keys have it.
fn tuple(src: SocketAddr, dst: SocketAddr, protocol: u8) -> FlowKey {
    let (src_port, dst_port) = (Port::new(src.port()), Port::new(dst.port()));
    FlowKey::new(protocol, src.ip().into(), src_port, dst.ip().into(), dst_port)
}
