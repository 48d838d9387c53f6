//! A separate datapath for one test: the agent's object, small maps, no pins, nothing attached.

mod cgroup;
pub mod devices;
mod flows;
pub(super) mod race;
mod records;
mod tables;

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, BorrowedFd},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{Program, SchedClassifier, Xdp},
};
use dataplane_common::{
    abi::{
        Addr, Endpoint, Event, FlowBlock, MacAddr, NodeConfig, NodeFlags, NodeVariables, Port,
        names::{self, map},
    },
    reason::{self, HookId, Outcome},
};

pub use self::cgroup::SocketPrograms;
use super::frame::{HOST_MAC, OVERLAY_MAC, Parsed};
use crate::sys_bpf::{TestRun, sums_of_array};

/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE`.
const SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;

/// VNI of a rig's tunnel, and the node that packets from it come from unless a test says otherwise.
pub const OVERLAY_VNI: u32 = 1;
pub const OVERLAY_NODE: Ipv4Addr = Ipv4Addr::new(172, 19, 0, 4);

/// Mark of handled packets in a rig.
pub const MARK: u32 = 0x1000;

/// Size of a rig's flow table.
pub const FLOWS: u32 = 64;

/// What the program tells the kernel to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `TCX_NEXT` or `XDP_PASS`.
    Next,
    Drop,
    Redirect,
    /// `XDP_TX`: transmit on the device it arrived on.
    Transmit,
}

/// The result of a program run.
#[derive(Clone, Debug)]
pub struct Run {
    pub action: Action,
    /// Name of the verdict or drop reason: the one counter that increased.
    pub outcome: &'static str,
    pub frame: Vec<u8>,
    /// `skb->mark` afterwards; 0 at XDP.
    pub mark: u32,
}

impl Run {
    /// The output packet.
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

/// A node configuration with every feature enabled.
pub fn node_config() -> NodeConfig {
    NodeConfig {
        host_mac: MacAddr::new(HOST_MAC),
        overlay_mac: MacAddr::new(OVERLAY_MAC),
        overlay_vni: OVERLAY_VNI,
        overlay_port: Port::new(8_472),
        reserved: 0,
        snat_first: Port::new(61_000),
        snat_last: Port::new(61_999),
        flow_slots: FLOWS,
        flags: NodeFlags::CONNECT_TCP
            | NodeFlags::CONNECT_UDP
            | NodeFlags::MASQUERADE
            | NodeFlags::ANSWER_PING
            | NodeFlags::TUNNEL_KEY_IN_CB,
        host_netns: [0; 8],
        mark: MARK,
    }
}

/// As [`node_config`], without connect-time translation of UDP: as by default.
pub fn per_packet_udp() -> NodeConfig {
    let node = node_config();
    NodeConfig { flags: node.flags & !NodeFlags::CONNECT_UDP, ..node }
}

/// The loaded datapath and its tables.
pub struct Rig {
    ebpf: Ebpf,
    /// Programs are loaded when a test first runs them: the verifier takes most of a test's time.
    loaded: Vec<HookId>,
    /// The uplink.
    pub ifindex: u32,
    flow_slots: u32,
}

/// What the kernel says of a frame at tc beside its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Metadata {
    /// The device that the program is attached to.
    pub ifindex: u32,
    /// Bytes of each packet of a GSO packet, and their number; 0: it is none, or (the number) the
    /// kernel has not counted them.
    pub gso_size: u32,
    pub gso_segs: u32,
    /// VNI, and node that sent a packet through the tunnel.
    pub tunnel: (u32, Ipv4Addr),
    /// `skb->mark`.
    pub mark: u32,
}

/// Offset of `mark` in `struct __sk_buff`.
const SKB_MARK: usize = 8;

impl Metadata {
    /// `struct __sk_buff`, with the fields that may be set.
    pub fn context(self) -> [u8; 192] {
        const IFINDEX: usize = 40;
        const CB: usize = 48;
        const GSO_SEGS: usize = 164;
        const GSO_SIZE: usize = 176;
        let mut context = [0; 192];
        let mut set = |at: usize, value: [u8; 4]| context[at..at + 4].copy_from_slice(&value);
        set(SKB_MARK, self.mark.to_ne_bytes());
        set(IFINDEX, self.ifindex.to_ne_bytes());
        set(CB, self.tunnel.0.to_ne_bytes());
        set(CB + 4, self.tunnel.1.octets());
        set(GSO_SEGS, self.gso_segs.to_ne_bytes());
        set(GSO_SIZE, self.gso_size.to_ne_bytes());
        context
    }
}

impl Rig {
    /// Loads the datapath for a node with these addresses.
    pub fn new(node: &NodeConfig, ipv4: IpAddr, ipv6: IpAddr) -> Result<Self> {
        // no range of cluster IPs: any address may be one
        let variables = NodeVariables { ipv4: ipv4.into(), ipv6: ipv6.into(), ..NodeVariables::default() };
        Self::with_config(node, &variables)
    }

    /// Loads the datapath with this configuration.
    pub fn with_config(node: &NodeConfig, variables: &NodeVariables) -> Result<Self> {
        let flags = node.flags | dataplane_agent::datapath::kernel_features::flags();
        let node = &NodeConfig { flags, ..*node };
        let mut loader = EbpfLoader::new();
        loader
            .override_global(names::NODE, node, true)
            .override_global(names::NODE_VARIABLES, variables, true)
            .override_global("AYA_LOG_LEVEL", &0_u8, false);
        for (name, entries) in [
            (map::ENDPOINTS, 64),
            (map::ROUTES, 64),
            (map::SERVICES, 128),
            (map::BACKENDS, 512),
            (map::BACKEND_GENERATIONS, 512),
            (map::FLOWS, node.flow_slots),
            (map::FLOW_BLOCKS, FlowBlock::count(node.flow_slots)),
            (map::FLOW_INDEX, 2 * node.flow_slots),
            (map::FLOW_NEXT_HOPS, 2 * node.flow_slots),
            (map::FRAGMENTED_PACKETS, 64),
            (map::REORDER_FRAGMENTS, 64),
            (map::DATAGRAM_ORIGINS, 64),
            (map::SOURCE_RANGES, 64),
            (map::AFFINITY, 64),
            (map::EVENTS, 4_096),
        ] {
            loader.map_max_entries(name, entries);
        }
        let ebpf = loader.load(dataplane_agent::datapath::OBJECT).context("load the object")?;
        devices::create()?;
        Ok(Self { ebpf, loaded: Vec::new(), ifindex: devices::WIRE, flow_slots: node.flow_slots })
    }

    /// Changes the variables of the loaded programs.
    pub fn change_variables(&mut self, change: impl FnOnce(&mut NodeVariables)) -> Result<()> {
        let mut data = self.array::<NodeVariables>(names::DATA)?;
        let mut variables = data.get(&0, 0)?;
        change(&mut variables);
        data.set(0, variables, 0)?;
        self.advance_generation()
    }

    /// Runs the program of `hook` on a frame, which arrives from a pod on the device of its source,
    /// and through the tunnel from the node of [`OVERLAY_NODE`].
    pub fn run(&mut self, hook: HookId, frame: &[u8]) -> Result<Run> {
        let metadata = self.metadata(hook, frame)?;
        self.run_with(hook, frame, metadata)
    }

    /// What [`Self::run`] says of a frame.
    pub fn metadata(&mut self, hook: HookId, frame: &[u8]) -> Result<Metadata> {
        let ifindex = match hook {
            HookId::FromPod => self.device_of_source(frame)?,
            HookId::ToPod => devices::PODS[0],
            HookId::FromWire | HookId::ToWire => self.ifindex,
            _ => devices::LOOPBACK,
        };
        Ok(Metadata { ifindex, gso_size: 0, gso_segs: 0, tunnel: (OVERLAY_VNI, OVERLAY_NODE), mark: 0 })
    }

    /// The device of the pod that has the frame's source address, else that of the first pod.
    fn device_of_source(&mut self, frame: &[u8]) -> Result<u32> {
        let source = match frame.get(12..14) {
            Some([0x08, 0x00]) => {
                frame.get(26..30).and_then(|ip| <[u8; 4]>::try_from(ip).ok()).map(IpAddr::from)
            }
            Some([0x86, 0xdd]) => {
                frame.get(22..38).and_then(|ip| <[u8; 16]>::try_from(ip).ok()).map(IpAddr::from)
            }
            _ => None,
        };
        let Some(source) = source else { return Ok(devices::PODS[0]) };
        let endpoint = self.hash::<Addr, Endpoint>(map::ENDPOINTS)?.get(&source.into(), 0).ok();
        Ok(endpoint
            .map(|endpoint| endpoint.ifindex)
            .filter(|ifindex| *ifindex != 0)
            .unwrap_or(devices::PODS[0]))
    }

    /// Runs the program of `hook` on a frame with this metadata.
    pub fn run_with(&mut self, hook: HookId, frame: &[u8], metadata: Metadata) -> Result<Run> {
        // a packet may grow: a reordered fragment is replaced by a longer one
        let mut out = vec![0; frame.len() + 2_048];
        let (skb, mut skb_out) = (metadata.context(), [0; 256]);
        let ((result, actions), outcome) = self.counted(hook, |rig| {
            let mut options =
                TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
            let (result, actions): (_, &[(i32, Action)]) = if hook == HookId::XdpWire {
                // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
                // egress_ifindex
                let context = [0, frame.len() as u32, 0, rig.ifindex, 0, 0].map(u32::to_ne_bytes).concat();
                options.ctx_in = Some(&context);
                let program: &mut Xdp = rig.ebpf.program_mut(hook.name()).context(hook.name())?.try_into()?;
                (program.test_run(options)?, &[(1, Action::Drop), (2, Action::Next), (3, Action::Transmit)])
            } else {
                options.ctx_in = Some(&skb);
                options.ctx_out = Some(&mut skb_out);
                let program = rig.classifier(hook)?;
                (program.test_run(options)?, &[(-1, Action::Next), (2, Action::Drop), (7, Action::Redirect)])
            };
            Ok((result, actions))
        })?;
        out.truncate(result.data_size_out as usize);
        let returned = result.return_value as i32;
        let action = actions.iter().find(|(number, _)| *number == returned);
        let (_, action) = *action.with_context(|| format!("unknown action {returned}"))?;
        let mark = u32::from_ne_bytes(skb_out[SKB_MARK..SKB_MARK + 4].try_into()?);
        Ok(Run { action, outcome, frame: out, mark })
    }

    /// As [`Self::run`], with `CHECKSUM_COMPLETE`; returns the outcome, or `None` if the kernel
    /// cannot check the result (before Linux 6.16).
    ///
    /// # Errors
    /// The kernel's checksum does not match the output packet.
    pub fn run_checksum_complete(&mut self, hook: HookId, frame: &[u8]) -> Result<Option<&'static str>> {
        let context = self.metadata(hook, frame)?.context();
        let run = TestRun { repeat: 1, flags: SKB_CHECKSUM_COMPLETE, batch_size: 0, context: &context };
        let checked = self.counted(hook, |rig| {
            run.run(rig.classifier(hook)?.fd()?.as_fd(), frame)
                .with_context(|| format!("{} on a packet with CHECKSUM_COMPLETE", hook.name()))
        });
        match checked {
            Ok(((), outcome)) => Ok(Some(outcome)),
            Err(error)
                if error
                    .downcast_ref::<std::io::Error>()
                    .is_some_and(|error| error.raw_os_error() == Some(libc::EINVAL)) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Calls `run`, which runs the program of `hook` once; returns also the name of the outcome:
    /// the one counter that increased.
    fn counted<T>(
        &mut self,
        hook: HookId,
        run: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<(T, &'static str)> {
        self.load(hook)?;
        let before = self.counters()?;
        let result = run(self)?;
        let after = self.counters()?;
        let increased: Vec<usize> =
            (0..before.len()).filter(|index| before[*index] != after[*index]).collect();
        ensure!(
            increased.len() == 1 && after[increased[0]] == before[increased[0]] + 1,
            "exactly one counter must increase, by one: {increased:?}"
        );
        ensure!(increased[0] as u32 / reason::OUTCOMES == hook as u32, "the counter belongs to another hook");
        let outcome = Outcome::from_number((increased[0] as u32 % reason::OUTCOMES) as u8)
            .context("unknown outcome")?;
        Ok((result, outcome.name()))
    }

    fn classifier(&mut self, hook: HookId) -> Result<&mut SchedClassifier> {
        Ok(self.ebpf.program_mut(hook.name()).context(hook.name())?.try_into()?)
    }

    /// The last event that the programs reported since the previous call.
    pub fn last_event(&mut self) -> Result<Option<Event>> {
        let mut ring = RingBuf::try_from(self.ebpf.map_mut(map::EVENTS).context("EVENTS")?)?;
        let mut last = None;
        while let Some(record) = ring.next() {
            last = Some(Event::from_bytes(&record).context("a record of another size")?);
        }
        Ok(last)
    }

    /// The loaded program of a hook.
    pub fn program(&mut self, hook: HookId) -> Result<BorrowedFd<'_>> {
        self.load(hook)?;
        let descriptor = match self.ebpf.program(hook.name()).context(hook.name())? {
            Program::Xdp(program) => program.fd()?,
            Program::SchedClassifier(program) => program.fd()?,
            _ => bail!("{} takes no packets", hook.name()),
        };
        Ok(descriptor.as_fd())
    }

    /// How many packets a hook has handled since the rig exists, and how many with this outcome.
    pub fn packets(&self, hook: HookId, outcome: &str) -> Result<(u64, u64)> {
        let first = reason::counter_index(hook, 0) as usize;
        let counters = self.counters()?;
        let of_hook = &counters[first..first + reason::OUTCOMES as usize];
        let wanted = of_hook
            .iter()
            .zip(0..)
            .filter(|(_, number)| Outcome::from_number(*number).is_some_and(|found| found.name() == outcome));
        Ok((of_hook.iter().sum(), wanted.map(|(count, _)| count).sum()))
    }

    fn load(&mut self, hook: HookId) -> Result<()> {
        if !self.loaded.contains(&hook) {
            let program = self.ebpf.program_mut(hook.name()).context(hook.name())?;
            dataplane_agent::datapath::loader::load_program(program)
                .with_context(|| format!("load {}", hook.name()))?;
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
        // before Linux 5.13: one value at a time
        let counters: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(counters)?;
        (0..reason::COUNTERS).map(|index| Ok(counters.get(&index, 0)?.iter().sum())).collect()
    }

    fn hash<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        Ok(HashMap::try_from(self.ebpf.map_mut(name).context(name.to_owned())?)?)
    }

    fn array<V: aya::Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, V>> {
        Ok(Array::try_from(self.ebpf.map_mut(name).context(name.to_owned())?)?)
    }
}
