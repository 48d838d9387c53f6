//! Many TCP connections report open, with an echo on each at an interval.

use std::{
    cell::Cell,
    io::{Error, ErrorKind, Result as IoResult},
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    task::{JoinSet, LocalSet},
    time::{sleep, timeout},
};

use super::{
    http::kind,
    print,
    report::{HeldConnections, Ready},
    stdin_closed,
};

/// Connections opened concurrently: fewer than a listener's backlog.
const BATCH: u32 = 64;

struct Connection {
    number: u32,
    stream: BufReader<TcpStream>,
    server: String,
    sent: u64,
    received: u64,
    misdirected: u64,
    slowest: Duration,
}

pub(super) async fn run(
    server: SocketAddr,
    count: u32,
    interval: Duration,
    deadline: Duration,
) -> Result<()> {
    let mut connections = Vec::new();
    for first in (0..count).step_by(BATCH as usize) {
        let mut batch = JoinSet::new();
        for number in first..count.min(first + BATCH) {
            batch.spawn(async move { timeout(deadline, Connection::open(number, server)).await });
        }
        for opened in batch.join_all().await {
            connections.push(opened.context("connect: timed out")?.context("connect")?);
        }
    }
    print(&Ready { ready: true })?;
    print(&LocalSet::new().run_until(hold(connections, interval, deadline)).await)
}

async fn hold(connections: Vec<Connection>, interval: Duration, deadline: Duration) -> HeldConnections {
    let ending = Rc::new(Cell::new(false));
    let mut report = HeldConnections { connections: connections.len() as u32, ..HeldConnections::default() };
    let mut tasks = JoinSet::new();
    for mut connection in connections {
        *report.servers.entry(connection.server.clone()).or_default() += 1;
        let ending = Rc::clone(&ending);
        tasks.spawn_local(async move {
            let end = connection.keep_echoing(&ending, interval, deadline).await;
            (connection, end)
        });
    }
    stdin_closed().await;
    ending.set(true);
    for (connection, end) in tasks.join_all().await {
        report.sent += connection.sent;
        report.received += connection.received;
        report.misdirected += connection.misdirected;
        report.slowest_us = report.slowest_us.max(connection.slowest.as_micros() as u64);
        if let Err(error) = end {
            *report.broken.entry(kind(&error).to_owned()).or_default() += 1;
        }
    }
    report
}

impl Connection {
    async fn open(number: u32, server: SocketAddr) -> IoResult<Self> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        let mut stream = BufReader::new(stream);
        let mut name = String::new();
        if stream.read_line(&mut name).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        name.truncate(name.trim_end().len());
        let slowest = Duration::ZERO;
        Ok(Self { number, stream, server: name, sent: 0, received: 0, misdirected: 0, slowest })
    }

    async fn keep_echoing(
        &mut self,
        ending: &Cell<bool>,
        interval: Duration,
        deadline: Duration,
    ) -> IoResult<()> {
        // spread over the interval: a burst of a thousand echoes would measure the queue
        sleep(interval.mul_f64(f64::from(self.number % 1_000) / 1_000.0)).await;
        loop {
            let began = Instant::now();
            match timeout(deadline, self.echo_once()).await {
                Ok(done) => done?,
                Err(elapsed) => return Err(Error::new(ErrorKind::TimedOut, elapsed)),
            }
            let took = began.elapsed();
            self.slowest = self.slowest.max(took);
            // also after stdin was closed, every connection completes one more echo
            if ending.get() {
                return Ok(());
            }
            sleep(interval.saturating_sub(took)).await;
        }
    }

    async fn echo_once(&mut self) -> IoResult<()> {
        let mut message = [0; 16];
        message[..8].copy_from_slice(&u64::from(self.number).to_be_bytes());
        message[8..].copy_from_slice(&self.sent.to_be_bytes());
        self.sent += 1;
        self.stream.write_all(&message).await?;
        let mut echo = [0; 16];
        self.stream.read_exact(&mut echo).await?;
        if echo == message {
            self.received += 1;
        } else {
            self.misdirected += 1;
        }
        Ok(())
    }
}
