//! Reports that clients print and tests parse.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// The first line of a client or server: it is ready to send or to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    pub ready: bool,
}

/// An HTTP request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Begin and end in microseconds of the monotonic clock.
    pub began_us: u64,
    pub ended_us: u64,
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// The result of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Answer(Answer),
    Failed(Failure),
}

/// A response to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Name of the server.
    pub name: String,
    /// The client as the server saw it.
    pub client: SocketAddr,
    /// The server as the client's socket shows it.
    pub server: SocketAddr,
    /// Bytes of the body.
    pub bytes: usize,
}

/// Why there was no response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// `refused`, `reset`, `timeout`, `unreachable`, `not_permitted` or `other`.
    pub kind: String,
    pub message: String,
}

/// Report of TCP connections held open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldConnections {
    pub connections: u32,
    /// Number of connections that broke, by reason.
    pub broken: BTreeMap<String, u32>,
    pub sent: u64,
    /// Correct echoes.
    pub received: u64,
    /// Echoes with other content.
    pub misdirected: u64,
    /// Longest round trip.
    pub slowest_us: u64,
    /// Number of connections by server.
    pub servers: BTreeMap<String, u32>,
}

/// Report of datagrams that were sent and echoed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagrams {
    pub sent: u64,
    pub received: u64,
    pub lost: u64,
    pub duplicated: u64,
    /// From another peer, or with another content.
    pub misdirected: u64,
    /// Failed sends and receives, by reason.
    pub errors: BTreeMap<String, u64>,
    /// Sequence numbers of the first lost datagrams.
    pub first_lost: Vec<u64>,
    /// Send times of the first lost datagrams in microseconds of the monotonic clock.
    pub first_lost_us: Vec<u64>,
    /// Number of echoes by server.
    pub servers: BTreeMap<String, u64>,
    /// For each server: the send time of the last datagram that it echoed, in microseconds of the
    /// monotonic clock.
    pub latest_us: BTreeMap<String, u64>,
    /// How often the kernel aborted a connected socket and the client connected a new one.
    pub ended: u64,
}

/// An echo of a datagram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Echo {
    /// Send and receive time in microseconds of the monotonic clock.
    pub sent_us: u64,
    pub received_us: u64,
    /// The server that echoed it.
    pub server: String,
}

/// A DNS answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    pub addresses: Vec<IpAddr>,
}

/// The transport of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    Tcp,
    Udp,
    /// INIT and INIT ACK only.
    Sctp,
}

/// A request to a server, repeated until enough servers have answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The result has the same number.
    pub number: usize,
    pub server: SocketAddr,
    pub transport: Transport,
    /// Number of servers after whose responses the probe ends.
    pub servers: usize,
    /// Timeout of a response.
    pub timeout_ms: u64,
    /// First of [`Self::PORTS`] source ports over UDP, used in turn; `None`: any free port.
    pub ports: Option<u16>,
}

impl Probe {
    pub const PORTS: u16 = 32;
}

/// The result of a probe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeResult {
    pub number: usize,
    /// Number of responses by server name and by the client address the server saw.
    pub answers: BTreeMap<String, BTreeMap<IpAddr, u32>>,
    /// RST, or ICMP "port unreachable".
    pub refused: u32,
    /// ABORT: SCTP is present at the address, but the port is closed.
    pub aborted: u32,
    /// No response.
    pub silent: u32,
    /// Other failures, by kind.
    pub failed: BTreeMap<String, u32>,
}

impl Request {
    pub const fn answer(&self) -> Option<&Answer> {
        match &self.outcome {
            Outcome::Answer(answer) => Some(answer),
            Outcome::Failed(_) => None,
        }
    }

    /// Whether the server of this name responded.
    pub fn is_from(&self, name: &str) -> bool {
        self.answer().is_some_and(|answer| answer.name == name)
    }
}

impl Datagrams {
    /// Whether every datagram was echoed once, by the right server.
    pub fn is_complete(&self) -> bool {
        let Self { sent, received, lost, duplicated, misdirected, errors, .. } = self;
        *sent > 0
            && received == sent
            && *lost == 0
            && *duplicated == 0
            && *misdirected == 0
            && errors.is_empty()
    }
}
