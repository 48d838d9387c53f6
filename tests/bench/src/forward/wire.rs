//! The rest of the network, as one end of a node's cable: packets are made there, and counted when they come back.

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

use super::{
    kernel::{Counters, Link, Program, Slot},
    programs::{self, EXPECTED, Expected, FRAME, Mac, OTHERS},
};
use crate::{load::pin, network::mac_of};

/// Processor everything happens on: who makes packets also does the kernel's work for them, up to the last device.
const CORE: usize = 0;
/// Packets between two looks at the clocks: some milliseconds of work.
const SLICE: u32 = 8_192;
/// How long a packet may be on its way.
const PATIENCE: Duration = Duration::from_millis(20);

/// A pair of devices that leads to nobody: what is sent there is received and counted, which is what all of this costs
/// without a node.
const NOWHERE: &str = "nowhere";
const NOWHERE_END: &str = "nowhere-end";

/// The end of a node's cable.
#[derive(Debug)]
pub(super) struct Wire {
    namespace: Namespace,
    port: Device,
    nowhere: Device,
    counters: Counters,
    ledger: Ledger,
    /// On the port, and on the pair's far end.
    sink: Link,
    nowhere_sink: Link,
    /// The near end hears nobody, but hears with a program, as the port does.
    _nowhere_pass: Link,
}

/// What is sent, and what must come of it.
#[derive(Clone, Debug)]
pub(super) struct Aim {
    pub(super) sent: Vec<u8>,
    pub(super) expected: Expected,
}

/// What was spent on packets.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spent {
    pub(super) sent: u64,
    pub(super) arrived: u64,
    pub(super) processor: Duration,
}

impl Spent {
    fn add(&mut self, other: Self) {
        self.sent += other.sent;
        self.arrived += other.arrived;
        self.processor += other.processor;
    }

    /// Seconds per packet that arrived.
    pub(super) fn each(&self) -> f64 {
        self.processor.as_secs_f64() / self.arrived.max(1) as f64
    }
}

/// A block: the same number of packets through the node and to nowhere, in turns.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns {
    pub(super) node: Spent,
    pub(super) nowhere: Spent,
    /// Seconds per packet that the node takes, turn by turn.
    pub(super) each: Vec<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Device {
    ifindex: u32,
    mac: Mac,
}

impl Wire {
    /// At `port` of `namespace`, the device at the other end of a node's cable. No driver runs a program there yet.
    pub(super) fn lay(namespace: &Namespace, port: &str) -> Result<Self> {
        namespace.ip(&format!(
            "link add {NOWHERE} type veth peer name {NOWHERE_END}\n\
             link set {NOWHERE} up\n\
             link set {NOWHERE_END} up"
        ))?;
        let counters = Counters::create(2)?;
        let pass = Program::load("pass", &programs::pass())?;
        let [port, nowhere, end] = [port, NOWHERE, NOWHERE_END].map(|name| Device::of(namespace, name));
        let (port, nowhere, end) = (port?, nowhere?, end?);
        let attach = |device: Device| namespace.enter(|| pass.attach(device.ifindex))?;
        Ok(Self {
            sink: attach(port)?,
            nowhere_sink: attach(end)?,
            _nowhere_pass: attach(nowhere)?,
            namespace: namespace.clone(),
            port,
            nowhere,
            counters,
            ledger: Ledger::open()?,
        })
    }

    /// Sends some packets and returns the last that arrived.
    pub(super) fn prove(&self, aim: &Aim) -> Result<Vec<u8>> {
        let slot = Slot::create(FRAME)?;
        let sink = Program::load("keep", &programs::sink(&aim.expected, &self.counters, Some(&slot)))?;
        self.sink.update(&sink)?;
        let generator = maker(aim, self.port)?;
        let count = programs::FLOWS.into();
        let others = self.total(OTHERS)?;
        let spent = self.on_the_core(|| self.slice(&generator, aim, count))?;
        ensure!(
            spent.arrived * 10 >= spent.sent * 9,
            "of {} packets {} arrived as {:?}, {} others did",
            spent.sent,
            spent.arrived,
            aim.expected,
            self.total(OTHERS)? - others
        );
        slot.read()
    }

    /// A block of `time` after a warm-up.
    pub(super) fn measure(&self, aim: &Aim, warm_up: Duration, time: Duration) -> Result<Turns> {
        let sink = Program::load("sink", &programs::sink(&aim.expected, &self.counters, None))?;
        self.sink.update(&sink)?;
        let plain = Aim { sent: aim.sent.clone(), expected: as_sent(&aim.sent)? };
        let drop = Program::load("sink", &programs::sink(&plain.expected, &self.counters, None))?;
        self.nowhere_sink.update(&drop)?;
        let generator = maker(aim, self.port)?;
        let to_nowhere = maker(&plain, self.nowhere)?;
        self.on_the_core(|| {
            let begun = Instant::now();
            while begun.elapsed() < warm_up {
                self.slice(&generator, aim, SLICE)?;
                self.slice(&to_nowhere, &plain, SLICE)?;
            }
            let before = self.elsewhere(EXPECTED)?;
            let mut turns = Turns::default();
            let begun = Instant::now();
            while begun.elapsed() < time || turns.each.is_empty() {
                let nowhere = self.slice(&to_nowhere, &plain, SLICE)?;
                let node = self.slice(&generator, aim, SLICE)?;
                turns.each.push(node.each() - nowhere.each());
                turns.node.add(node);
                turns.nowhere.add(nowhere);
            }
            let strayed = self.elsewhere(EXPECTED)? - before;
            ensure!(strayed == 0, "{strayed} packets were handled by another processor than {CORE}");
            Ok(turns)
        })
    }

    fn on_the_core<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.namespace.enter(|| {
            pin(CORE)?;
            work()
        })?
    }

    /// Sends, and waits until all have come or no more do.
    fn slice(&self, generator: &Program, aim: &Aim, count: u32) -> Result<Spent> {
        let before = self.total(EXPECTED)?;
        let begun = self.ledger.read()?;
        generator.run_live(&aim.sent, count)?;
        let mut arrived = self.total(EXPECTED)? - before;
        let mut spent = self.ledger.read()?;
        let mut changed = Instant::now();
        while arrived < count.into() && changed.elapsed() < PATIENCE {
            // the kernel's own thread may have the rest
            std::thread::yield_now();
            let now = self.total(EXPECTED)? - before;
            if now != arrived {
                (arrived, spent, changed) = (now, self.ledger.read()?, Instant::now());
            }
        }
        Ok(Spent { sent: count.into(), arrived, processor: spent.saturating_sub(begun) })
    }

    fn total(&self, counter: u32) -> Result<u64> {
        Ok(self.counters.read(counter)?.iter().sum())
    }

    /// Of processors other than ours.
    fn elsewhere(&self, counter: u32) -> Result<u64> {
        let values = self.counters.read(counter)?;
        Ok(values.iter().enumerate().filter(|(core, _)| *core != CORE).map(|(_, value)| value).sum())
    }
}

/// Makes packets as `aim` has them, and sends them out of `device`.
fn maker(aim: &Aim, device: Device) -> Result<Program> {
    let mut frame = aim.sent.clone();
    frame[6..12].copy_from_slice(&device.mac);
    Program::load("generator", &programs::generator(&frame, device.ifindex))
}

impl Device {
    fn of(namespace: &Namespace, name: &str) -> Result<Self> {
        let ifindex = namespace.enter(|| if_nametoindex(name))?.with_context(|| format!("find {name}"))?;
        Ok(Self { ifindex, mac: parse_mac(&mac_of(namespace, name)?)? })
    }
}

/// `02:00:00:00:00:01` as bytes.
pub(super) fn parse_mac(text: &str) -> Result<Mac> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).with_context(|| format!("{text:?} is no link address"))
}

/// The frame, should it arrive as it was sent.
fn as_sent(frame: &[u8]) -> Result<Expected> {
    let sent = Parsed::read(frame).map_err(|problem| anyhow!("what is sent: {problem}"))?;
    match sent.tuple() {
        (SocketAddr::V4(src), SocketAddr::V4(dst)) => Ok(Expected { mac: sent.eth_dst, src: *src.ip(), dst }),
        other => bail!("what is sent is {other:?}, which is not IPv4"),
    }
}

/// Processor time that work of the core's network has taken so far, by whom the kernel charges it to: the thread that sends,
/// which runs the softirqs it raises, or the kernel's own thread, which gets what is too much at a time.
#[derive(Clone, Debug)]
struct Ledger {
    kernels: PathBuf,
}

impl Ledger {
    fn open() -> Result<Self> {
        let name = format!("ksoftirqd/{CORE}");
        for entry in fs::read_dir("/proc").context("read /proc")? {
            let process = entry?.path();
            if fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm.trim() == name) {
                return Ok(Self { kernels: process.join("schedstat") });
            }
        }
        bail!("/proc shows no {name}: its time would be missing")
    }

    /// Of the calling thread, and the kernel's.
    fn read(&self) -> Result<Duration> {
        let thread = Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?);
        let path = &self.kernels;
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok());
        Ok(thread + Duration::from_nanos(nanos.with_context(|| format!("{} is {text:?}", path.display()))?))
    }
}
