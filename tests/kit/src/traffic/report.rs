//! What clients print and tests read.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// The first line of a client or server that has come as far as it must before anything is asked of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    pub ready: bool,
}

/// An HTTP request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Microseconds of the monotonic clock when it began, and when it ended.
    pub began_us: u64,
    pub ended_us: u64,
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Answer(Answer),
    Failed(Failure),
}

/// An answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The server's.
    pub name: String,
    /// The client as the server saw it.
    pub client: SocketAddr,
    /// The server as the client's socket shows it.
    pub server: SocketAddr,
    /// Bytes of the body.
    pub bytes: usize,
}

/// Why there was no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// `refused`, `reset`, `timeout`, `unreachable`, `not_permitted` or `other`.
    pub kind: String,
    pub message: String,
}

/// TCP connections that were held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub connections: u32,
    /// Connections that ended, and why.
    pub broken: BTreeMap<String, u32>,
    pub sent: u64,
    /// Echoes that came back as they were.
    pub received: u64,
    /// Echoes of something else.
    pub misdirected: u64,
    /// Longest from question to echo.
    pub slowest_us: u64,
    /// Connections by server.
    pub servers: BTreeMap<String, u32>,
}

/// Datagrams that were sent and came back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagrams {
    pub sent: u64,
    pub received: u64,
    pub lost: u64,
    pub duplicated: u64,
    /// From somebody who was not asked, or with somebody else's content.
    pub misdirected: u64,
    /// Sends and receives that were refused, and why.
    pub errors: BTreeMap<String, u64>,
    /// Numbers of the first lost ones.
    pub first_lost: Vec<u64>,
    /// When these were sent, in microseconds of the monotonic clock.
    pub first_lost_us: Vec<u64>,
    /// Echoes by server.
    pub servers: BTreeMap<String, u64>,
    /// Of each server: when the last datagram was sent that it gave back, in microseconds of the monotonic clock.
    pub latest_us: BTreeMap<String, u64>,
    /// Times the kernel ended a connected socket, and its owner connected anew.
    pub ended: u64,
}

/// A datagram that came back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Echo {
    /// Microseconds of the monotonic clock.
    pub sent_us: u64,
    pub received_us: u64,
    /// Who gave it back.
    pub server: String,
}

/// A DNS answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    pub addresses: Vec<IpAddr>,
}

/// How a question is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    Tcp,
    Udp,
    /// By its first packets: INIT and INIT ACK.
    Sctp,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Its answer has the same.
    pub number: usize,
    pub server: SocketAddr,
    pub transport: Transport,
    /// Asked until so many have answered.
    pub servers: usize,
    /// Longest that an answer is waited for.
    pub patience_ms: u64,
    /// First of [`Self::PORTS`] ports it asks from over UDP, one after the other; `None`: from whichever is free.
    pub ports: Option<u16>,
}

impl Probe {
    pub const PORTS: u16 = 32;
}

/// What came of a question, asked several times.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    pub number: usize,
    /// Who answered, under which address it saw the client, how often.
    pub answers: BTreeMap<String, BTreeMap<IpAddr, u32>>,
    /// RST, or ICMP "port unreachable".
    pub refused: u32,
    /// ABORT: there is SCTP at that address, and nobody at that port.
    pub aborted: u32,
    pub silent: u32,
    /// Everything else, by kind.
    pub failed: BTreeMap<String, u32>,
}

impl Request {
    pub const fn answer(&self) -> Option<&Answer> {
        match &self.outcome {
            Outcome::Answer(answer) => Some(answer),
            Outcome::Failed(_) => None,
        }
    }

    /// The server of this name has answered it.
    pub fn is_from(&self, name: &str) -> bool {
        self.answer().is_some_and(|answer| answer.name == name)
    }
}

impl Datagrams {
    /// Every one came back, once, from whom it should.
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
