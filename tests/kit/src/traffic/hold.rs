//! Many TCP connections that are kept, with a question and its echo on each at an interval.

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
    report::{Held, Ready},
    told_to_end,
};

/// Connections opened at once, so that a listener's backlog does not overflow.
const WAVE: u32 = 64;

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
    patience: Duration,
) -> Result<()> {
    let mut connections = Vec::new();
    for first in (0..count).step_by(WAVE as usize) {
        let mut wave = JoinSet::new();
        for number in first..count.min(first + WAVE) {
            wave.spawn(async move { timeout(patience, Connection::open(number, server)).await });
        }
        for opened in wave.join_all().await {
            connections.push(opened.context("connect: no answer")?.context("connect")?);
        }
    }
    print(&Ready { ready: true })?;
    print(&LocalSet::new().run_until(hold(connections, interval, patience)).await)
}

async fn hold(connections: Vec<Connection>, interval: Duration, patience: Duration) -> Held {
    let ending = Rc::new(Cell::new(false));
    let mut held = Held { connections: connections.len() as u32, ..Held::default() };
    let mut tasks = JoinSet::new();
    for mut connection in connections {
        *held.servers.entry(connection.server.clone()).or_default() += 1;
        let ending = Rc::clone(&ending);
        tasks.spawn_local(async move {
            let end = connection.talk(&ending, interval, patience).await;
            (connection, end)
        });
    }
    told_to_end().await;
    ending.set(true);
    for (connection, end) in tasks.join_all().await {
        held.sent += connection.sent;
        held.received += connection.received;
        held.misdirected += connection.misdirected;
        held.slowest_us = held.slowest_us.max(connection.slowest.as_micros() as u64);
        if let Err(error) = end {
            *held.broken.entry(kind(&error).to_owned()).or_default() += 1;
        }
    }
    held
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

    async fn talk(&mut self, ending: &Cell<bool>, interval: Duration, patience: Duration) -> IoResult<()> {
        // spread over the interval: a thousand questions at once would measure the queue
        sleep(interval.mul_f64(f64::from(self.number % 1_000) / 1_000.0)).await;
        loop {
            let began = Instant::now();
            match timeout(patience, self.ask()).await {
                Ok(done) => done?,
                Err(elapsed) => return Err(Error::new(ErrorKind::TimedOut, elapsed)),
            }
            let took = began.elapsed();
            self.slowest = self.slowest.max(took);
            // at the end as in the middle: every connection is heard once more
            if ending.get() {
                return Ok(());
            }
            sleep(interval.saturating_sub(took)).await;
        }
    }

    async fn ask(&mut self) -> IoResult<()> {
        let mut question = [0; 16];
        question[..8].copy_from_slice(&u64::from(self.number).to_be_bytes());
        question[8..].copy_from_slice(&self.sent.to_be_bytes());
        self.sent += 1;
        self.stream.write_all(&question).await?;
        let mut echo = [0; 16];
        self.stream.read_exact(&mut echo).await?;
        if echo == question {
            self.received += 1;
        } else {
            self.misdirected += 1;
        }
        Ok(())
    }
}
