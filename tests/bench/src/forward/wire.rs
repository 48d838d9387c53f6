//! The far end of a node's veth: generates packets and counts those that come back.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    net::if_::if_nametoindex,
    time::{ClockId, clock_gettime},
};

use dataplane_testkit::{lab::Namespace, prog::Parsed};

use super::programs::{self, EXPECTED, Expected, FRAME, Mac, OTHERS};
use crate::{
    bpf::{
        kernel::{Counters, Kind, Link, Program, Slot},
        programs::empty,
    },
    load::pin,
    network::mac_of,
};

/// The processor of all work: the generating thread also runs the kernel's softirqs for the
/// packets.
const CORE: usize = 0;
/// Packets between two clock readings: some milliseconds of work.
const SLICE: u32 = 8_192;
/// Time after which missing packets count as lost.
const LOSS_TIMEOUT: Duration = Duration::from_millis(20);

/// A veth pair without a node: packets are sent through it and counted to measure the overhead.
const OVERHEAD: &str = "overhead";
const OVERHEAD_END: &str = "overhead-end";

/// The far end of a node's veth, and the veth pair without a node.
#[derive(Debug)]
pub(super) struct Wire {
    namespace: Namespace,
    port: Device,
    overhead: Device,
    counters: Counters,
    cpu_clock: CpuClock,
    /// The counting programs on the port and on the far end of the pair.
    sink: Link,
    overhead_sink: Link,
    /// A program on the near end, as the port has one.
    _overhead_pass: Link,
}

/// The packet that is sent, and the packet that must arrive.
#[derive(Clone, Debug)]
pub(super) struct TestPacket {
    pub(super) sent: Vec<u8>,
    pub(super) expected: Expected,
}

/// Processor time spent on packets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PacketCost {
    pub(super) sent: u64,
    pub(super) arrived: u64,
    pub(super) processor: Duration,
}

impl PacketCost {
    fn add(&mut self, other: Self) {
        self.sent += other.sent;
        self.arrived += other.arrived;
        self.processor += other.processor;
    }

    /// Returns the seconds per packet that arrived.
    pub(super) fn per_packet(&self) -> f64 {
        self.processor.as_secs_f64() / self.arrived.max(1) as f64
    }
}

/// A block: alternating slices of packets through the node and through the pair without a node.
#[derive(Clone, Debug, Default)]
pub(super) struct BlockResult {
    pub(super) node: PacketCost,
    pub(super) overhead: PacketCost,
    /// Seconds per packet of the node, without overhead, by slice.
    pub(super) node_seconds: Vec<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Device {
    ifindex: u32,
    mac: Mac,
}

impl Wire {
    /// Attaches to `port` in `namespace`, the far end of a node's veth, which has no XDP program
    /// yet.
    pub(super) fn attach(namespace: &Namespace, port: &str) -> Result<Self> {
        namespace.ip(&format!(
            "link add {OVERHEAD} type veth peer name {OVERHEAD_END}\n\
             link set {OVERHEAD} up\n\
             link set {OVERHEAD_END} up"
        ))?;
        let counters = Counters::create(2)?;
        // a veth receives XDP frames from its peer only with a program attached
        let pass = Program::load("pass", Kind::Xdp, &empty(programs::XDP_PASS as u32))?;
        let [port, overhead, end] = [port, OVERHEAD, OVERHEAD_END].map(|name| Device::of(namespace, name));
        let (port, overhead, end) = (port?, overhead?, end?);
        let attach = |device: Device| namespace.enter(|| pass.attach(device.ifindex))?;
        Ok(Self {
            sink: attach(port)?,
            overhead_sink: attach(end)?,
            _overhead_pass: attach(overhead)?,
            namespace: namespace.clone(),
            port,
            overhead,
            counters,
            cpu_clock: CpuClock::open()?,
        })
    }

    /// Sends some packets and returns the last one that arrived.
    pub(super) fn verify(&self, packet: &TestPacket) -> Result<Vec<u8>> {
        let slot = Slot::create(FRAME)?;
        let sink =
            Program::load("keep", Kind::Xdp, &programs::sink(&packet.expected, &self.counters, Some(&slot)))?;
        self.sink.update(&sink)?;
        let generator = load_generator(packet, self.port)?;
        let count = programs::FLOWS.into();
        let others = self.total(OTHERS)?;
        let cost = self.on_core(|| self.slice(&generator, packet, count))?;
        ensure!(
            cost.arrived * 10 >= cost.sent * 9,
            "of {} packets {} arrived as {:?}, and {} other packets",
            cost.sent,
            cost.arrived,
            packet.expected,
            self.total(OTHERS)? - others
        );
        slot.read()
    }

    /// Measures a block of `time` after a warm-up.
    pub(super) fn measure(
        &self,
        packet: &TestPacket,
        warm_up: Duration,
        time: Duration,
    ) -> Result<BlockResult> {
        let sink = Program::load("sink", Kind::Xdp, &programs::sink(&packet.expected, &self.counters, None))?;
        self.sink.update(&sink)?;
        let plain = TestPacket { sent: packet.sent.clone(), expected: unchanged(&packet.sent)? };
        let drop = Program::load("sink", Kind::Xdp, &programs::sink(&plain.expected, &self.counters, None))?;
        self.overhead_sink.update(&drop)?;
        let generator = load_generator(packet, self.port)?;
        let overhead_generator = load_generator(&plain, self.overhead)?;
        self.on_core(|| {
            let started = Instant::now();
            while started.elapsed() < warm_up {
                self.slice(&generator, packet, SLICE)?;
                self.slice(&overhead_generator, &plain, SLICE)?;
            }
            let before = self.on_other_cores(EXPECTED)?;
            let mut block = BlockResult::default();
            let started = Instant::now();
            while started.elapsed() < time || block.node_seconds.is_empty() {
                let overhead = self.slice(&overhead_generator, &plain, SLICE)?;
                let node = self.slice(&generator, packet, SLICE)?;
                block.node_seconds.push(node.per_packet() - overhead.per_packet());
                block.node.add(node);
                block.overhead.add(overhead);
            }
            let other_core = self.on_other_cores(EXPECTED)? - before;
            ensure!(other_core == 0, "{other_core} packets were processed on another processor than {CORE}");
            Ok(block)
        })
    }

    fn on_core<T: Send>(&self, task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.namespace.enter(|| {
            pin(CORE)?;
            task()
        })?
    }

    /// Sends packets and waits until all have arrived, or none for [`LOSS_TIMEOUT`].
    fn slice(&self, generator: &Program, packet: &TestPacket, count: u32) -> Result<PacketCost> {
        let before = self.total(EXPECTED)?;
        let started = self.cpu_clock.read()?;
        generator.run_live(&packet.sent, count)?;
        let mut arrived = self.total(EXPECTED)? - before;
        let mut cost = self.cpu_clock.read()?;
        let mut changed = Instant::now();
        while arrived < count.into() && changed.elapsed() < LOSS_TIMEOUT {
            // ksoftirqd may process the rest
            std::thread::yield_now();
            let now = self.total(EXPECTED)? - before;
            if now != arrived {
                (arrived, cost, changed) = (now, self.cpu_clock.read()?, Instant::now());
            }
        }
        Ok(PacketCost { sent: count.into(), arrived, processor: cost.saturating_sub(started) })
    }

    fn total(&self, counter: u32) -> Result<u64> {
        Ok(self.counters.read(counter)?.iter().sum())
    }

    /// Returns a counter's sum over the other processors.
    fn on_other_cores(&self, counter: u32) -> Result<u64> {
        let values = self.counters.read(counter)?;
        Ok(values.iter().enumerate().filter(|(core, _)| *core != CORE).map(|(_, value)| value).sum())
    }
}

/// Loads the generator of these packets for `device`.
fn load_generator(packet: &TestPacket, device: Device) -> Result<Program> {
    let mut frame = packet.sent.clone();
    frame[6..12].copy_from_slice(&device.mac);
    Program::load("generator", Kind::Xdp, &programs::generator(&frame, device.ifindex))
}

impl Device {
    fn of(namespace: &Namespace, name: &str) -> Result<Self> {
        let ifindex = namespace
            .enter(|| if_nametoindex(name))?
            .with_context(|| format!("cannot find device {name}"))?;
        Ok(Self { ifindex, mac: parse_mac(&mac_of(namespace, name)?)? })
    }
}

/// `02:00:00:00:00:01` as bytes.
pub(super) fn parse_mac(text: &str) -> Result<Mac> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).with_context(|| format!("{text:?} is not a MAC address"))
}

/// The expected packet if the frame arrives unchanged.
fn unchanged(frame: &[u8]) -> Result<Expected> {
    let sent = Parsed::read(frame).map_err(|problem| anyhow!("cannot parse the sent packet: {problem}"))?;
    match sent.tuple() {
        (SocketAddr::V4(src), SocketAddr::V4(dst)) => Ok(Expected { mac: sent.eth_dst, src: *src.ip(), dst }),
        other => bail!("the sent packet is not IPv4: {other:?}"),
    }
}

/// Reads the processor time of network processing on the core: of the sending thread, which runs
/// the softirqs it raises, and of ksoftirqd, which runs deferred ones.
#[derive(Clone, Debug)]
struct CpuClock {
    ksoftirqd: PathBuf,
}

impl CpuClock {
    fn open() -> Result<Self> {
        let name = format!("ksoftirqd/{CORE}");
        for entry in fs::read_dir("/proc").context("cannot read /proc")? {
            let process = entry?.path();
            if fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm.trim() == name) {
                return Ok(Self { ksoftirqd: process.join("schedstat") });
            }
        }
        bail!("cannot find the thread {name} in /proc; its time would be missing")
    }

    /// Returns the time of the calling thread and of ksoftirqd.
    fn read(&self) -> Result<Duration> {
        let thread = Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?);
        let path = &self.ksoftirqd;
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
        Ok(thread + Duration::from_nanos(nanos.with_context(|| format!("{} is {text:?}", path.display()))?))
    }
}
