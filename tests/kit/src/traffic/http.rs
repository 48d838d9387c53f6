//! The HTTP client: a connection per request.

use std::{
    io::{Error, ErrorKind, Result as IoResult},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::Result;
use futures::future::try_join_all;
use nix::time::{ClockId, clock_gettime};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use super::{
    print,
    report::{Answer, Failure, Outcome, Request},
    sctp, stdin_closed,
};

/// Consecutive failures after which a client with a count stops.
const MAX_FAILURES: u32 = 5;

pub(super) struct Client {
    pub(super) server: SocketAddr,
    pub(super) transport: Transport,
    /// Source address; `None`: the kernel's choice. TCP only.
    pub(super) from: Option<IpAddr>,
    pub(super) bytes: usize,
    pub(super) timeout: Duration,
}

/// The transport of HTTP.
#[derive(Clone, Copy)]
pub(super) enum Transport {
    Tcp,
    Sctp,
}

pub(super) async fn run(client: &Client, clients: u32, count: Option<u64>, interval: Duration) -> Result<()> {
    let Some(count) = count else {
        // spread over the interval
        let all = (0..clients).map(|number| async move {
            sleep(interval * number / clients).await;
            endless(client, interval).await
        });
        return tokio::select! {
            () = stdin_closed() => Ok(()),
            failed = try_join_all(all) => failed.map(drop),
        };
    };
    let mut failed_in_a_row = 0;
    for _ in 0..count {
        let request = client.request().await?;
        print(&request)?;
        failed_in_a_row = if request.answer().is_some() { 0 } else { failed_in_a_row + 1 };
        if failed_in_a_row == MAX_FAILURES {
            break;
        }
        sleep(interval).await;
    }
    Ok(())
}

async fn endless(client: &Client, interval: Duration) -> Result<()> {
    loop {
        print(&client.request().await?)?;
        sleep(interval).await;
    }
}

impl Client {
    async fn request(&self) -> Result<Request> {
        let began_us = now_us()?;
        let outcome = match timeout(self.timeout, self.get()).await {
            Ok(Ok(answer)) => Outcome::Answer(answer),
            Ok(Err(error)) => {
                Outcome::Failed(Failure { kind: kind(&error).to_owned(), message: error.to_string() })
            }
            Err(elapsed) => {
                Outcome::Failed(Failure { kind: "timeout".to_owned(), message: elapsed.to_string() })
            }
        };
        Ok(Request { began_us, ended_us: now_us()?, outcome })
    }

    pub(super) async fn get(&self) -> IoResult<Answer> {
        let mut stream = match self.transport {
            Transport::Tcp => self.connect().await?,
            Transport::Sctp => sctp::connect(self.server).await?,
        };
        let server = stream.peer_addr()?;
        let path = if self.bytes == 0 { "/".to_owned() } else { format!("/bytes/{}", self.bytes) };
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.server);
        stream.write_all(request.as_bytes()).await?;
        let mut response = Vec::new();
        stream.read_to_end(&mut response).await?;
        parse(&response, server).ok_or_else(|| {
            let text = String::from_utf8_lossy(&response[..response.len().min(200)]).into_owned();
            Error::new(
                ErrorKind::InvalidData,
                format!("not a complete response of the traffic server: {text:?}"),
            )
        })
    }

    async fn connect(&self) -> IoResult<TcpStream> {
        let Some(from) = self.from else { return TcpStream::connect(self.server).await };
        let socket = if from.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind(SocketAddr::new(from, 0))?;
        socket.connect(self.server).await
    }
}

fn parse(response: &[u8], server: SocketAddr) -> Option<Answer> {
    let end = response.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = str::from_utf8(&response[..end]).ok()?;
    let bytes = response.len() - end - 4;
    let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    if !head.starts_with("HTTP/1.1 200 ") || header("Content-Length")? != bytes.to_string() {
        return None;
    }
    Some(Answer {
        name: header("Server")?.to_owned(),
        client: header("X-Client")?.parse().ok()?,
        server,
        bytes,
    })
}

pub(super) fn kind(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => "reset",
        ErrorKind::TimedOut => "timeout",
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "unreachable",
        ErrorKind::PermissionDenied => "not_permitted",
        _ => "other",
    }
}

/// Microseconds of the monotonic clock, the same for all processes.
pub fn now_us() -> Result<u64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    Ok(u64::try_from(now.as_micros())?)
}
