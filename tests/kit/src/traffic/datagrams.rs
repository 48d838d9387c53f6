//! UDP echo with sequence numbers: counts lost, duplicated and misdirected datagrams.

use std::{
    io::{Error, Result as IoResult},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::libc::{ECONNABORTED, EDESTADDRREQ};
use tokio::{
    net::UdpSocket,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};

use super::{
    fragments::{self, Order},
    http::{kind, now_us},
    print,
    report::{Datagrams, Echo, Ready},
    stdin_closed,
};

/// Maximum number of lost datagrams that are listed.
const SHOWN: usize = 20;

pub(super) struct Plan {
    pub(super) server: SocketAddr,
    pub(super) count: Option<u64>,
    pub(super) size: usize,
    /// Print every echo.
    pub(super) each: bool,
    pub(super) kind: Kind,
    pub(super) interval: Duration,
    pub(super) timeout: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Connected,
    Unconnected,
    Fresh,
    Fragments(Order),
}

pub(super) async fn run(plan: &Plan) -> Result<()> {
    if plan.kind == Kind::Fresh {
        return fresh(plan).await;
    }
    let mut socket = plan.socket().await?;
    let mut tally = Tally::default();
    print(&Ready { ready: true })?;
    let mut ticks = interval(plan.interval.max(Duration::from_micros(100)));
    // do not send a burst after a delay of this process
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut buffer = vec![0; 65_536];
    let end = stdin_closed();
    tokio::pin!(end);
    while plan.count.is_none_or(|count| tally.report.sent < count) {
        tokio::select! {
            () = &mut end, if plan.count.is_none() => break,
            _ = ticks.tick() => tally.send(plan, &socket).await?,
            got = plan.receive(&socket, &mut buffer) => tally.take(plan, got, &buffer)?,
        }
        if std::mem::take(&mut tally.is_aborted) {
            socket = plan.socket().await?;
            tally.report.ended += 1;
        }
    }
    let deadline = Instant::now() + plan.timeout;
    while tally.seen.contains(&false) {
        tokio::select! {
            () = sleep_until(deadline) => break,
            got = plan.receive(&socket, &mut buffer) => tally.take(plan, got, &buffer)?,
        }
    }
    print(&tally.finish())
}

/// Uses a new socket for each datagram, as a resolver does.
async fn fresh(plan: &Plan) -> Result<()> {
    let mut tally = Tally::default();
    print(&Ready { ready: true })?;
    let mut buffer = vec![0; 65_536];
    let mut ticks = interval(plan.interval.max(Duration::from_micros(100)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = stdin_closed();
    tokio::pin!(end);
    while plan.count.is_none_or(|count| tally.report.sent < count) {
        tokio::select! {
            () = &mut end, if plan.count.is_none() => break,
            _ = ticks.tick() => {}
        }
        let socket = plan.socket().await?;
        tally.send(plan, &socket).await?;
        if let Ok(got) = timeout(plan.timeout, plan.receive(&socket, &mut buffer)).await {
            tally.take(plan, got, &buffer)?;
        }
    }
    print(&tally.finish())
}

impl Plan {
    async fn socket(&self) -> Result<UdpSocket> {
        let any: IpAddr = match self.server {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).await.context("bind a UDP socket")?;
        if self.kind == Kind::Connected {
            socket.connect(self.server).await.context("connect a UDP socket")?;
        }
        Ok(socket)
    }

    fn payload(&self, number: u64) -> Vec<u8> {
        let mut payload = format!("{}:{number}:", std::process::id()).into_bytes();
        payload.resize(self.size.max(payload.len()), b'x');
        payload
    }

    async fn send(&self, socket: &UdpSocket, payload: &[u8]) -> IoResult<usize> {
        match self.kind {
            Kind::Connected => socket.send(payload).await,
            Kind::Unconnected | Kind::Fresh => socket.send_to(payload, self.server).await,
            Kind::Fragments(order) => {
                let port = socket.local_addr()?.port();
                fragments::send(self.server, order, port, payload).map(|()| payload.len())
            }
        }
    }

    async fn receive(&self, socket: &UdpSocket, buffer: &mut [u8]) -> IoResult<(usize, SocketAddr)> {
        socket.recv_from(buffer).await
    }
}

#[derive(Default)]
struct Tally {
    report: Datagrams,
    seen: Vec<bool>,
    sent_us: Vec<u64>,
    /// The kernel has aborted the socket.
    is_aborted: bool,
}

impl Tally {
    async fn send(&mut self, plan: &Plan, socket: &UdpSocket) -> Result<()> {
        let payload = plan.payload(self.report.sent);
        self.report.sent += 1;
        self.seen.push(false);
        self.sent_us.push(now_us()?);
        if let Err(error) = plan.send(socket, &payload).await {
            self.fail("send", &error);
        }
        Ok(())
    }

    /// Records an error. A socket that the kernel has aborted returns an error to the next receive
    /// and to every send.
    fn fail(&mut self, operation: &str, error: &Error) {
        if [ECONNABORTED, EDESTADDRREQ].map(Some).contains(&error.raw_os_error()) {
            self.is_aborted = true;
            return;
        }
        *self.report.errors.entry(format!("{operation}: {}", kind(error))).or_default() += 1;
    }

    fn take(&mut self, plan: &Plan, got: IoResult<(usize, SocketAddr)>, buffer: &[u8]) -> Result<()> {
        let (length, peer) = match got {
            Ok(got) => got,
            Err(error) => {
                self.fail("receive", &error);
                return Ok(());
            }
        };
        match plan.number(&buffer[..length]).filter(|_| peer == plan.server) {
            Some((number, server)) if (number as usize) < self.seen.len() => {
                if std::mem::replace(&mut self.seen[number as usize], true) {
                    self.report.duplicated += 1;
                } else {
                    self.report.received += 1;
                    let sent_us = self.sent_us[number as usize];
                    let latest = self.report.latest_us.entry(server.clone()).or_default();
                    *latest = sent_us.max(*latest);
                    if plan.each {
                        print(&Echo { sent_us, received_us: now_us()?, server: server.clone() })?;
                    }
                    *self.report.servers.entry(server).or_default() += 1;
                }
            }
            _ => self.report.misdirected += 1,
        }
        Ok(())
    }

    fn finish(mut self) -> Datagrams {
        let lost = || self.seen.iter().enumerate().filter(|(_, seen)| !**seen);
        self.report.lost = lost().count() as u64;
        self.report.first_lost = lost().map(|(number, _)| number as u64).take(SHOWN).collect();
        self.report.first_lost_us = lost().map(|(number, _)| self.sent_us[number]).take(SHOWN).collect();
        self.report
    }
}

impl Plan {
    /// Sequence number and server of an echo to this client.
    fn number(&self, echo: &[u8]) -> Option<(u64, String)> {
        let text = str::from_utf8(echo).ok()?;
        let number = text.split(':').nth(1)?.parse().ok()?;
        let rest = text.as_bytes().strip_prefix(self.payload(number).as_slice())?;
        let server = str::from_utf8(rest).ok()?.strip_prefix(' ')?;
        Some((number, server.to_owned()))
    }
}
