//! The load generator: a client thread and a server thread, each on its own core, both polling.
//!
//! It measures the network and not the scheduler: on two virtual processors, waking a sleeping
//! thread costs several times the cost of the packet. Both sides make only the system calls of a
//! real client and server. The program is the same for all variants.

mod bulk;
mod client;
mod histogram;
mod server;

use std::{fmt, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

pub use client::run;
pub use histogram::Histogram;
pub use server::serve;

/// The line that a server prints when it listens.
pub const READY: &str = "ready";

/// One byte each way, to measure only the cost per packet.
const REQUEST: [u8; 1] = [b'q'];

/// The first byte of a connection whose data the server discards.
const BULK: [u8; 1] = [b'b'];

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Load {
    /// Request and response of one byte on several concurrent TCP connections.
    TcpRr { connections: usize },
    /// Connect, request and response of one byte, close; one connection at a time.
    TcpCrr,
    /// A datagram and its echo.
    UdpRr,
    /// Data in one direction, at a fixed rate.
    Bulk,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TcpRr { connections } => write!(f, "TCP RR ×{connections}"),
            Self::TcpCrr => f.write_str("TCP CRR"),
            Self::UdpRr => f.write_str("UDP RR"),
            Self::Bulk => f.write_str("bulk"),
        }
    }
}

/// Parameters of a client run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub load: Load,
    pub target: SocketAddr,
    /// Runs before the measurement.
    pub warm_up: Duration,
    pub time: Duration,
}

/// The result of a client run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub operations: u64,
    pub seconds: f64,
    pub per_second: f64,
    /// Connections that were refused, reset or timed out.
    pub errors: u64,
    /// Datagrams without a reply.
    pub lost: u64,
    /// Measurement overhead per operation in microseconds, not included in the other numbers.
    pub overhead: f64,
    pub latency: Latency,
}

/// Latency of an operation in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// Moves this thread into a network namespace.
pub fn enter_namespace(path: &Path) -> Result<()> {
    let file =
        std::fs::File::open(path).with_context(|| format!("cannot open namespace {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter namespace {}", path.display()))
}

/// Moves this process into a cgroup, for connect-time translation.
pub fn enter_cgroup(path: &Path) -> Result<()> {
    let procs = path.join("cgroup.procs");
    // "0" is the writing process
    std::fs::write(&procs, "0").with_context(|| format!("cannot enter cgroup {}", path.display()))
}

/// Pins this thread to one processor.
pub fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core).with_context(|| format!("processor {core} does not exist"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot pin to processor {core}"))
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, thread};

    use super::*;

    /// Every load runs against a server on loopback without errors and losses.
    #[test]
    fn every_load_runs_without_errors_and_losses() {
        let probe = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let target = probe.local_addr().expect("its address");
        drop(probe);
        let (ready, is_ready) = std::sync::mpsc::channel();
        thread::spawn(move || serve(target, || ready.send(()).map_err(Into::into)));
        is_ready.recv().expect("the server listens");
        for load in
            [Load::TcpRr { connections: 1 }, Load::TcpRr { connections: 4 }, Load::TcpCrr, Load::UdpRr]
        {
            // on a busy machine, two pollers may make no progress in the shortest time
            let times = (0..8).map(|doublings| Duration::from_millis(100 << doublings));
            let runs = times.map(|time| run(&Run { load, target, warm_up: time / 4, time }).expect("a run"));
            let mut with_replies = runs.filter(|outcome| outcome.operations > 0);
            let outcome = with_replies.next().unwrap_or_else(|| panic!("{load}: no reply"));
            assert_eq!((outcome.errors, outcome.lost), (0, 0), "{load}");
            assert!(outcome.latency.p50 > 0.0 && outcome.latency.p50 <= outcome.latency.p99, "{load}");
        }
    }

    #[test]
    fn refused_connection_is_an_error() {
        let target = "127.0.0.1:1".parse().expect("an address");
        let time = Duration::from_millis(10);
        for load in [Load::TcpCrr, Load::TcpRr { connections: 1 }, Load::UdpRr] {
            assert!(run(&Run { load, target, warm_up: time, time }).is_err(), "{load}");
        }
    }
}
