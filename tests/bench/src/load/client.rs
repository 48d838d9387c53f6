//! The side that asks and measures.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};

use super::{Histogram, Load, Outcome, REQUEST, Run};

/// An answer that takes longer will not come.
const PATIENCE: Duration = Duration::from_secs(1);
/// A datagram is cheap to ask again.
const UDP_PATIENCE: Duration = Duration::from_millis(100);

/// Runs one load against one target.
///
/// # Errors
/// When the target does not answer at all; an operation that fails later is counted.
pub fn run(run: &Run) -> Result<Outcome> {
    let mut tally = Tally::new(run);
    match run.load {
        Load::TcpRr { connections } => tcp_rr(run.target, connections, &mut tally),
        Load::TcpCrr => tcp_crr(run.target, &mut tally),
        Load::UdpRr => udp_rr(run.target, &mut tally),
    }
    .with_context(|| format!("{} to {}", run.load, run.target))?;
    Ok(tally.outcome())
}

/// Counts what happens between warm-up and end.
struct Tally {
    start: Instant,
    end: Instant,
    histogram: Histogram,
    errors: u64,
    lost: u64,
}

impl Tally {
    fn new(run: &Run) -> Self {
        let start = Instant::now() + run.warm_up;
        Self { start, end: start + run.time, histogram: Histogram::default(), errors: 0, lost: 0 }
    }

    fn done(&mut self, asked: Instant, answered: Instant) {
        if asked >= self.start {
            self.histogram.record(answered - asked);
        }
    }

    fn outcome(&self) -> Outcome {
        // what began before the end has been waited for, so the time is that of the last answer
        let seconds = self.start.elapsed().as_secs_f64();
        let operations = self.histogram.count();
        Outcome {
            operations,
            seconds,
            per_second: operations as f64 / seconds,
            errors: self.errors,
            lost: self.lost,
            overhead: 0.0,
            latency: self.histogram.latency(),
        }
    }
}

fn tcp_rr(target: SocketAddr, connections: usize, tally: &mut Tally) -> Result<()> {
    let mut asked = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        stream.write_all(&REQUEST)?;
        asked.push((stream, Instant::now()));
    }
    let mut answer = [0; 8];
    loop {
        for (stream, since) in &mut asked {
            match stream.read(&mut answer) {
                Ok(0) => bail!("the server closed a connection"),
                Ok(_) => {
                    let now = Instant::now();
                    tally.done(*since, now);
                    if now >= tally.end {
                        return Ok(());
                    }
                    *since = now;
                    stream.write_all(&REQUEST)?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ensure!(since.elapsed() < PATIENCE, "no answer for {PATIENCE:?}");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn tcp_crr(target: SocketAddr, tally: &mut Tally) -> Result<()> {
    // a path that does not work shows before the first blocking connect
    drop(TcpStream::connect_timeout(&target, PATIENCE).context("first connection")?);
    loop {
        let asked = Instant::now();
        if asked >= tally.end {
            return Ok(());
        }
        match connection(target) {
            Ok(()) => tally.done(asked, Instant::now()),
            Err(_counted) => tally.errors += 1,
        }
    }
}

/// A whole life: handshake, a byte there and back, both ends closed.
fn connection(target: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(target)?;
    stream.write_all(&REQUEST)?;
    ensure!(poll_byte(&stream)?, "closed without an answer");
    stream.shutdown(Shutdown::Write)?;
    ensure!(!poll_byte(&stream)?, "more than an answer");
    Ok(())
}

/// Reads a byte without ever sleeping; `false` at the end of the stream.
fn poll_byte(stream: &TcpStream) -> Result<bool> {
    let mut byte = [0; 1];
    let mut turns = 0_u32;
    let mut since = None;
    loop {
        match recv(stream.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::EAGAIN) => {
                // looking at the clock in every turn would cost more than the turn
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(1024) {
                    let since = since.get_or_insert_with(Instant::now);
                    ensure!(since.elapsed() < PATIENCE, "no answer for {PATIENCE:?}");
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn udp_rr(target: SocketAddr, tally: &mut Tally) -> Result<()> {
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    socket.set_nonblocking(true)?;
    let mut answered_once = false;
    let mut number = 0_u64;
    loop {
        number += 1;
        let asked = Instant::now();
        if asked >= tally.end {
            ensure!(answered_once, "no datagram was answered");
            return Ok(());
        }
        socket.send(&number.to_ne_bytes())?;
        if await_datagram(&socket, number, asked)? {
            answered_once = true;
            tally.done(asked, Instant::now());
        } else {
            tally.lost += 1;
        }
    }
}

/// Whether the answer to `number` came in time; late answers to earlier ones are passed over.
fn await_datagram(socket: &UdpSocket, number: u64, asked: Instant) -> Result<bool> {
    let mut answer = [0; 8];
    loop {
        match socket.recv(&mut answer) {
            Ok(_) if u64::from_ne_bytes(answer) == number => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if asked.elapsed() >= UDP_PATIENCE {
                    return Ok(false);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}
