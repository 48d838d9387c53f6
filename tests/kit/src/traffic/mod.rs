//! Small servers and clients that record what they send, and so detect what is lost, duplicated or
//! misdirected.
//!
//! `dataplane-traffic` runs one of them in the namespace and cgroup of a pod or node. It prints
//! results as lines of JSON ([`report`]). Clients without a count end when their stdin closes.
//! Knows no cluster.

mod ask;
mod datagrams;
mod dns;
mod fragments;
mod hold;
mod http;
mod probe;
mod raw_sctp;
pub mod report;
mod sctp;
mod sctp_packet;
mod serve;

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use tokio::io::AsyncReadExt as _;

pub use dns::RecordType;
pub use fragments::Order;
pub use http::now_us;

/// Port of the server's HTTP.
pub const HTTP: u16 = 8080;
/// Port of the server's echo.
pub const ECHO: u16 = 7000;
/// Port at which the server answers SCTP INITs, if enabled.
pub const SCTP: u16 = 3_868;

/// Default timeout of a single response.
const TIMEOUT_MS: u64 = 3_000;

/// What to run.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Answer on both families: HTTP with this name and the peer's address, TCP and UDP echo
    Serve {
        #[arg(long)]
        name: String,
        #[arg(long, default_value_t = HTTP)]
        http: u16,
        /// TCP and UDP
        #[arg(long, default_value_t = ECHO)]
        echo: u16,
        /// Listen on this address only
        #[arg(long, default_value = "::")]
        bind: std::net::IpAddr,
        /// Serve only HTTP, over SCTP
        #[arg(long)]
        sctp: bool,
        /// Answer SCTP INITs as well, with raw sockets: for kernels without SCTP
        #[arg(long, conflicts_with = "sctp")]
        raw_sctp: bool,
    },
    /// HTTP with a connection per request; a line for each
    Http {
        server: SocketAddr,
        /// Number of concurrent clients, until stdin closes
        #[arg(long, default_value_t = 1, conflicts_with = "count")]
        clients: u32,
        /// Number of requests; without it, until stdin closes
        #[arg(long)]
        count: Option<u64>,
        #[arg(long, default_value_t = 0)]
        interval_ms: u64,
        /// Bytes of the body to request
        #[arg(long, default_value_t = 0)]
        bytes: usize,
        #[arg(long, default_value_t = TIMEOUT_MS)]
        timeout_ms: u64,
        /// Over SCTP
        #[arg(long, conflicts_with = "from")]
        sctp: bool,
        /// Source address
        #[arg(long)]
        from: Option<std::net::IpAddr>,
    },
    /// Many TCP connections with an echo on each at an interval, until stdin closes
    Hold {
        server: SocketAddr,
        #[arg(long, default_value_t = 1)]
        connections: u32,
        #[arg(long, default_value_t = 100)]
        interval_ms: u64,
        /// Timeout of the last echoes
        #[arg(long, default_value_t = TIMEOUT_MS)]
        timeout_ms: u64,
    },
    /// UDP echo with sequence numbers, for a number of datagrams or until stdin closes
    Datagrams {
        server: SocketAddr,
        #[arg(long)]
        count: Option<u64>,
        #[arg(long, default_value_t = 10)]
        interval_ms: u64,
        /// Bytes of a datagram
        #[arg(long, default_value_t = 64)]
        size: usize,
        /// Use `connect()`; otherwise each datagram names its destination
        #[arg(long)]
        connected: bool,
        /// Use a new socket for each datagram
        #[arg(long, conflicts_with = "connected")]
        fresh: bool,
        /// Send fragments in this order with a raw socket
        #[arg(long, conflicts_with_all = ["connected", "fresh"])]
        fragments: Option<Order>,
        /// Print a line for each echo, before the report
        #[arg(long)]
        each: bool,
        /// Timeout of the last echoes
        #[arg(long, default_value_t = TIMEOUT_MS)]
        timeout_ms: u64,
    },
    /// Send a datagram to each UDP echo server over one socket, then print the sources of the
    /// answers
    Ask {
        servers: Vec<SocketAddr>,
        #[arg(long, default_value_t = TIMEOUT_MS)]
        timeout_ms: u64,
    },
    /// Run the probes read from stdin, a line of JSON each, concurrently; a line for each
    Probe,
    /// Query a DNS server
    Dns {
        server: SocketAddr,
        name: String,
        #[arg(long = "type", default_value = "a")]
        record: RecordType,
        #[arg(long)]
        tcp: bool,
        #[arg(long, default_value_t = TIMEOUT_MS)]
        timeout_ms: u64,
    },
}

/// Runs the command to its end.
pub async fn run(command: Command) -> Result<()> {
    let ms = Duration::from_millis;
    match command {
        Command::Ask { servers, timeout_ms } => ask::run(&servers, ms(timeout_ms)).await,
        Command::Serve { name, http, bind, sctp: true, .. } => {
            serve::over_sctp(&name, SocketAddr::new(bind, http)).await
        }
        Command::Serve { name, http, echo, bind, raw_sctp, .. } => {
            serve::run(&name, bind, http, echo, raw_sctp.then_some(SCTP)).await
        }
        Command::Http { server, clients, count, interval_ms, bytes, timeout_ms, sctp, from } => {
            let transport = if sctp { http::Transport::Sctp } else { http::Transport::Tcp };
            let client = http::Client { server, transport, from, bytes, timeout: ms(timeout_ms) };
            http::run(&client, clients, count, ms(interval_ms)).await
        }
        Command::Hold { server, connections, interval_ms, timeout_ms } => {
            hold::run(server, connections, ms(interval_ms), ms(timeout_ms)).await
        }
        Command::Datagrams {
            server,
            count,
            interval_ms,
            size,
            connected,
            fresh,
            fragments,
            each,
            timeout_ms,
        } => {
            let kind = match (connected, fresh, fragments) {
                (true, ..) => datagrams::Kind::Connected,
                (_, true, _) => datagrams::Kind::Fresh,
                (_, _, Some(order)) => datagrams::Kind::Fragments(order),
                _ => datagrams::Kind::Unconnected,
            };
            let plan = datagrams::Plan {
                server,
                count,
                size,
                each,
                kind,
                interval: ms(interval_ms),
                timeout: ms(timeout_ms),
            };
            datagrams::run(&plan).await
        }
        Command::Probe => probe::run().await,
        Command::Dns { server, name, record, tcp, timeout_ms } => {
            dns::run(server, &name, record, tcp, ms(timeout_ms)).await
        }
    }
}

/// Waits until stdin closes.
async fn stdin_closed() {
    let mut rest = Vec::new();
    // an error of stdin counts as closed
    let _closed = tokio::io::stdin().read_to_end(&mut rest).await;
}

/// Prints a report as a line of JSON.
#[expect(clippy::print_stdout, reason = "reports go to stdout")]
fn print(report: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(report).context("write a report")?);
    Ok(())
}

/// The address without IPv4 mapping: a dual-stack socket shows IPv4 peers as mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
