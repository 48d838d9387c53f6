//! Many questions at once: who answers, whom the server saw, and how a question ends that nobody answers.
//!
//! Reads a question per line until its stdin closes, then asks; every question is asked from a socket of its own until it
//! was answered by as many servers as it wants. What is refused is asked twice, silence is not.

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
    print, raw,
    report::{Heard, Probe, Transport},
    serve::WHO,
};

/// Questions that are being asked at a time.
const AT_ONCE: usize = 24;
/// Asked at least so often, so that somebody who should not answer has the chance to.
const LEAST: u32 = 6;
/// Asked at most so often: one of three servers is missed then once in 10¹¹ runs.
const MOST: u32 = 64;
/// Answers of the wrong kind after which no more are wanted.
const ENOUGH: u32 = 2;

pub(super) async fn run() -> Result<()> {
    let mut lines = BufReader::new(stdin()).lines();
    let mut probes: Vec<Probe> = Vec::new();
    while let Some(line) = lines.next_line().await? {
        probes.push(serde_json::from_str(&line).with_context(|| format!("a question: {line}"))?);
    }
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for probe in probes {
        let turns = Arc::clone(&turns);
        tasks.spawn(async move {
            let _turn = turns.acquire().await;
            ask(&probe).await
        });
    }
    tasks.join_all().await.iter().try_for_each(print)
}

async fn ask(probe: &Probe) -> Heard {
    let mut heard = Heard { number: probe.number, ..Heard::default() };
    let patience = Duration::from_millis(probe.patience_ms);
    for asked in 1..=MOST {
        let answer = match probe.transport {
            Transport::Tcp => timeout(patience, over_tcp(probe.server, patience)).await,
            Transport::Udp => timeout(patience, over_udp(probe.server, port(probe, asked))).await,
            Transport::Sctp => Ok(over_sctp(probe.server, patience).await),
        };
        match answer {
            Ok(Ok((name, source))) => *heard.answers.entry(name).or_default().entry(source).or_default() += 1,
            Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => heard.refused += 1,
            Ok(Err(error)) if error.kind() == ErrorKind::ConnectionAborted => heard.aborted += 1,
            Ok(Err(error)) if is_over(&error, probe.transport) => heard.silent += 1,
            Ok(Err(error)) => *heard.failed.entry(failure(&error)).or_default() += 1,
            Err(_elapsed) => heard.silent += 1,
        }
        let failed: u32 = heard.refused + heard.aborted + heard.failed.values().sum::<u32>();
        let is_complete = asked >= LEAST && heard.answers.len() >= probe.servers;
        if is_complete || heard.silent > 0 || failed >= ENOUGH {
            break;
        }
    }
    heard
}

async fn over_tcp(server: SocketAddr, patience: Duration) -> IoResult<(String, IpAddr)> {
    let client =
        http::Client { server, transport: http::Transport::Tcp, from: None, bytes: 0, timeout: patience };
    let answer = client.get().await?;
    if answer.server != server {
        return Err(Error::other(format!("the socket says that its peer is {}", answer.server)));
    }
    Ok((answer.name, answer.client.ip()))
}

/// To ask from: 0 is whichever is free.
fn port(probe: &Probe, asked: u32) -> u16 {
    probe.ports.map_or(0, |first| first + (asked % u32::from(Probe::PORTS)) as u16)
}

async fn over_udp(server: SocketAddr, port: u16) -> IoResult<(String, IpAddr)> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, port)).await?;
    // only a connected socket hears of a refusal, and only of answers from whom it asked
    socket.connect(server).await?;
    socket.send(WHO).await?;
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).await?;
    str::from_utf8(&buffer[..length]).ok().and_then(name_and_peer).ok_or_else(not_ours)
}

async fn over_sctp(server: SocketAddr, patience: Duration) -> IoResult<(String, IpAddr)> {
    let answer = spawn_blocking(move || raw::ask(server, patience)).await??;
    name_and_peer(&answer).ok_or_else(not_ours)
}

/// SCTP's questions look at the clock themselves. TCP's own patience is longer than any of ours.
fn is_over(error: &Error, transport: Transport) -> bool {
    transport == Transport::Sctp && error.kind() == ErrorKind::TimedOut
}

fn name_and_peer(answer: &str) -> Option<(String, IpAddr)> {
    let (name, peer) = answer.rsplit_once(' ')?;
    Some((name.to_owned(), peer.parse::<SocketAddr>().ok()?.ip()))
}

fn not_ours() -> Error {
    Error::new(ErrorKind::InvalidData, "no answer of ours")
}

fn failure(error: &Error) -> String {
    match kind(error) {
        "other" => error.to_string(),
        kind => kind.to_owned(),
    }
}
