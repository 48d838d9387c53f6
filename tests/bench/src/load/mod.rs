//! The load generator: one thread asks, one thread answers, each on its core, neither ever asleep while it works.
//!
//! What is measured is the network between them and not the scheduler: on a machine with two virtual processors,
//! waking a sleeping peer costs several times what the packet costs. So both sides poll, and both make only the
//! system calls a real client and server make per operation. The same program serves every variant.

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

/// What a server prints when it listens.
pub const READY: &str = "ready";

/// One byte each way: no byte is cheaper to carry, so all that is left is the cost of a packet.
const REQUEST: [u8; 1] = [b'q'];

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Load {
    /// A byte there and back on each of some TCP connections, all of them busy at once.
    TcpRr { connections: usize },
    /// Connect, a byte there and back, close: all of it, one connection after the other.
    TcpCrr,
    /// A datagram there and back.
    UdpRr,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TcpRr { connections } => write!(f, "TCP RR ×{connections}"),
            Self::TcpCrr => f.write_str("TCP CRR"),
            Self::UdpRr => f.write_str("UDP RR"),
        }
    }
}

/// One run of a client.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub load: Load,
    pub target: SocketAddr,
    /// Runs but does not count.
    pub warm_up: Duration,
    pub time: Duration,
}

/// What a client found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub operations: u64,
    pub seconds: f64,
    pub per_second: f64,
    /// Connections refused, reset or silent for too long.
    pub errors: u64,
    /// Datagrams without an answer.
    pub lost: u64,
    /// Microseconds of each operation that belong to the measuring, and are in none of the other numbers.
    pub overhead: f64,
    pub latency: Latency,
}

/// Of one operation, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// Moves this thread into a network namespace, so that its sockets belong there.
pub fn enter_namespace(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path).with_context(|| format!("open namespace {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter namespace {}", path.display()))
}

/// Moves this process into a cgroup: connect-time translation belongs to a cgroup.
pub fn enter_cgroup(path: &Path) -> Result<()> {
    let procs = path.join("cgroup.procs");
    // "0" is whoever writes it
    std::fs::write(&procs, "0").with_context(|| format!("enter cgroup {}", path.display()))
}

/// Keeps this thread on one processor.
pub fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core).with_context(|| format!("no processor {core}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("pin to processor {core}"))
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, thread};

    use super::*;

    /// A server on loopback answers every kind of load, without an error and without a loss.
    #[test]
    fn every_load_is_answered_without_an_error() {
        let probe = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let target = probe.local_addr().expect("its address");
        drop(probe);
        let (ready, is_ready) = std::sync::mpsc::channel();
        thread::spawn(move || serve(target, || ready.send(()).map_err(Into::into)));
        is_ready.recv().expect("the server listens");
        for load in
            [Load::TcpRr { connections: 1 }, Load::TcpRr { connections: 4 }, Load::TcpCrr, Load::UdpRr]
        {
            // two pollers on a machine that does other things get few turns, in the shortest time perhaps none
            let times = (0..8).map(|doublings| Duration::from_millis(100 << doublings));
            let runs = times.map(|time| run(&Run { load, target, warm_up: time / 4, time }).expect("a run"));
            let mut answered = runs.filter(|outcome| outcome.operations > 0);
            let outcome = answered.next().unwrap_or_else(|| panic!("{load}: nothing was answered"));
            assert_eq!((outcome.errors, outcome.lost), (0, 0), "{load}");
            assert!(outcome.latency.p50 > 0.0 && outcome.latency.p50 <= outcome.latency.p99, "{load}");
        }
    }

    #[test]
    fn a_target_that_refuses_is_an_error_and_not_a_rate() {
        let target = "127.0.0.1:1".parse().expect("an address");
        let time = Duration::from_millis(10);
        for load in [Load::TcpCrr, Load::TcpRr { connections: 1 }, Load::UdpRr] {
            assert!(run(&Run { load, target, warm_up: time, time }).is_err(), "{load}");
        }
    }
}
