//! The client of the load generator.

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

/// Timeout of a TCP reply.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Timeout of a UDP reply; the datagram then counts as lost.
const UDP_TIMEOUT: Duration = Duration::from_millis(100);

/// Runs one load against one target.
///
/// # Errors
/// The target does not reply at all. Later failures are counted.
pub fn run(run: &Run) -> Result<Outcome> {
    let mut recorder = Recorder::new(run);
    match run.load {
        Load::TcpRr { connections } => tcp_rr(run.target, connections, &mut recorder),
        Load::TcpCrr => tcp_crr(run.target, &mut recorder),
        Load::UdpRr => udp_rr(run.target, &mut recorder),
        Load::Bulk => {
            return super::bulk::run(run).with_context(|| format!("{} to {}", run.load, run.target));
        }
    }
    .with_context(|| format!("{} to {}", run.load, run.target))?;
    Ok(recorder.outcome())
}

/// Records the operations between warm-up and end.
struct Recorder {
    start: Instant,
    end: Instant,
    histogram: Histogram,
    errors: u64,
    lost: u64,
}

impl Recorder {
    fn new(run: &Run) -> Self {
        let start = Instant::now() + run.warm_up;
        Self { start, end: start + run.time, histogram: Histogram::default(), errors: 0, lost: 0 }
    }

    fn record(&mut self, sent_at: Instant, received_at: Instant) {
        if sent_at >= self.start {
            self.histogram.record(received_at - sent_at);
        }
    }

    fn outcome(&self) -> Outcome {
        // the last operation may end after `end`, so take the real time
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

fn tcp_rr(target: SocketAddr, connections: usize, recorder: &mut Recorder) -> Result<()> {
    let mut sent_at = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut stream = TcpStream::connect_timeout(&target, TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        stream.write_all(&REQUEST)?;
        sent_at.push((stream, Instant::now()));
    }
    let mut reply = [0; 8];
    loop {
        for (stream, since) in &mut sent_at {
            match stream.read(&mut reply) {
                Ok(0) => bail!("the server closed a connection"),
                Ok(_) => {
                    let now = Instant::now();
                    recorder.record(*since, now);
                    if now >= recorder.end {
                        return Ok(());
                    }
                    *since = now;
                    stream.write_all(&REQUEST)?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ensure!(since.elapsed() < TIMEOUT, "no reply for {TIMEOUT:?}");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn tcp_crr(target: SocketAddr, recorder: &mut Recorder) -> Result<()> {
    // check the path with a timeout before the first blocking connect
    drop(TcpStream::connect_timeout(&target, TIMEOUT).context("cannot connect")?);
    loop {
        let sent_at = Instant::now();
        if sent_at >= recorder.end {
            return Ok(());
        }
        match connection(target) {
            Ok(()) => recorder.record(sent_at, Instant::now()),
            Err(_counted) => recorder.errors += 1,
        }
    }
}

/// Connects, sends a byte, receives its echo and closes both sides.
fn connection(target: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(target)?;
    stream.write_all(&REQUEST)?;
    ensure!(poll_byte(&stream)?, "the server closed without a reply");
    stream.shutdown(Shutdown::Write)?;
    ensure!(!poll_byte(&stream)?, "the server sent more than one reply");
    Ok(())
}

/// Reads a byte by polling; `false` at the end of the stream.
fn poll_byte(stream: &TcpStream) -> Result<bool> {
    let mut byte = [0; 1];
    let mut polls = 0_u32;
    let mut since = None;
    loop {
        match recv(stream.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::EAGAIN) => {
                // reading the clock costs more than a poll
                polls = polls.wrapping_add(1);
                if polls.is_multiple_of(1024) {
                    let since = since.get_or_insert_with(Instant::now);
                    ensure!(since.elapsed() < TIMEOUT, "no reply for {TIMEOUT:?}");
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn udp_rr(target: SocketAddr, recorder: &mut Recorder) -> Result<()> {
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    socket.set_nonblocking(true)?;
    let mut has_reply = false;
    let mut number = 0_u64;
    loop {
        number += 1;
        let sent_at = Instant::now();
        if sent_at >= recorder.end {
            ensure!(has_reply, "no reply to any datagram");
            return Ok(());
        }
        socket.send(&number.to_ne_bytes())?;
        if await_datagram(&socket, number, sent_at)? {
            has_reply = true;
            recorder.record(sent_at, Instant::now());
        } else {
            recorder.lost += 1;
        }
    }
}

/// Whether the reply to `number` arrives in time; ignores late replies to earlier datagrams.
fn await_datagram(socket: &UdpSocket, number: u64, sent_at: Instant) -> Result<bool> {
    let mut reply = [0; 8];
    loop {
        match socket.recv(&mut reply) {
            Ok(_) if u64::from_ne_bytes(reply) == number => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if sent_at.elapsed() >= UDP_TIMEOUT {
                    return Ok(false);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}
