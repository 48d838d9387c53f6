//! Many concurrent probes: which servers respond, which client address they saw, and how a request
//! without response fails.
//!
//! Reads a probe per line until stdin closes, then runs them. A probe repeats its request from a
//! new socket until enough servers have responded. It is repeated after a refusal, but not after a
//! timeout.

use std::{
    io::{Error, ErrorKind, Result as IoResult},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, stdin},
    net::UdpSocket,
    sync::Semaphore,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

use super::{
    http::{self, kind},
    print, raw_sctp,
    report::{Probe, ProbeResult, Transport},
    serve::NAME_REQUEST,
};

/// Maximum number of concurrent probes.
const MAX_CONCURRENT: usize = 24;
/// Minimum number of requests: a server that should not respond gets the chance to.
const MIN_REQUESTS: u32 = 6;
/// Maximum number of requests: the chance to miss one of three servers is below 10⁻¹¹.
const MAX_REQUESTS: u32 = 64;
/// Failed requests after which a probe ends.
const MAX_FAILURES: u32 = 2;

pub(super) async fn run() -> Result<()> {
    let mut lines = BufReader::new(stdin()).lines();
    let mut probes: Vec<Probe> = Vec::new();
    while let Some(line) = lines.next_line().await? {
        probes.push(serde_json::from_str(&line).with_context(|| format!("a probe: {line}"))?);
    }
    let permits = Arc::new(Semaphore::new(MAX_CONCURRENT));
    let mut tasks = JoinSet::new();
    for probe in probes {
        let permits = Arc::clone(&permits);
        tasks.spawn(async move {
            let _permit = permits.acquire().await;
            run_probe(&probe).await
        });
    }
    tasks.join_all().await.iter().try_for_each(print)
}

async fn run_probe(probe: &Probe) -> ProbeResult {
    let mut result = ProbeResult { number: probe.number, ..ProbeResult::default() };
    let deadline = Duration::from_millis(probe.timeout_ms);
    for attempt in 1..=MAX_REQUESTS {
        let answer = match probe.transport {
            Transport::Tcp => timeout(deadline, over_tcp(probe.server, deadline)).await,
            Transport::Udp => timeout(deadline, over_udp(probe.server, port(probe, attempt))).await,
            Transport::Sctp => Ok(over_sctp(probe.server, deadline).await),
        };
        match answer {
            Ok(Ok((name, source))) => {
                *result.answers.entry(name).or_default().entry(source).or_default() += 1;
            }
            Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => result.refused += 1,
            Ok(Err(error)) if error.kind() == ErrorKind::ConnectionAborted => result.aborted += 1,
            Ok(Err(error)) if is_timeout(&error, probe.transport) => result.silent += 1,
            Ok(Err(error)) => *result.failed.entry(failure(&error)).or_default() += 1,
            Err(_elapsed) => result.silent += 1,
        }
        let failed: u32 = result.refused + result.aborted + result.failed.values().sum::<u32>();
        let is_complete = attempt >= MIN_REQUESTS && result.answers.len() >= probe.servers;
        if is_complete || result.silent > 0 || failed >= MAX_FAILURES {
            break;
        }
    }
    result
}

async fn over_tcp(server: SocketAddr, deadline: Duration) -> IoResult<(String, IpAddr)> {
    let client =
        http::Client { server, transport: http::Transport::Tcp, from: None, bytes: 0, timeout: deadline };
    let answer = client.get().await?;
    if answer.server != server {
        return Err(Error::other(format!("the peer address of the socket is {}", answer.server)));
    }
    Ok((answer.name, answer.client.ip()))
}

/// The source port; 0: any free port.
fn port(probe: &Probe, attempt: u32) -> u16 {
    probe.ports.map_or(0, |first| first + (attempt % u32::from(Probe::PORTS)) as u16)
}

async fn over_udp(server: SocketAddr, port: u16) -> IoResult<(String, IpAddr)> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, port)).await?;
    // only a connected socket receives ICMP errors, and only it drops datagrams of other peers
    socket.connect(server).await?;
    socket.send(NAME_REQUEST).await?;
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).await?;
    str::from_utf8(&buffer[..length]).ok().and_then(name_and_peer).ok_or_else(unexpected_response)
}

async fn over_sctp(server: SocketAddr, deadline: Duration) -> IoResult<(String, IpAddr)> {
    let answer = spawn_blocking(move || raw_sctp::request(server, deadline)).await??;
    name_and_peer(&answer).ok_or_else(unexpected_response)
}

/// `raw_sctp` has its own timeout. The kernel's timeout for TCP is longer than a probe's.
fn is_timeout(error: &Error, transport: Transport) -> bool {
    transport == Transport::Sctp && error.kind() == ErrorKind::TimedOut
}

fn name_and_peer(answer: &str) -> Option<(String, IpAddr)> {
    let (name, peer) = answer.rsplit_once(' ')?;
    Some((name.to_owned(), peer.parse::<SocketAddr>().ok()?.ip()))
}

fn unexpected_response() -> Error {
    Error::new(ErrorKind::InvalidData, "not a response of the traffic server")
}

fn failure(error: &Error) -> String {
    match kind(error) {
        "other" => error.to_string(),
        kind => kind.to_owned(),
    }
}
