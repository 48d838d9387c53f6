//! Small servers and clients that know what they have sent, and so what was lost, came twice or went astray.
//!
//! `dataplane-traffic` runs one of them inside a pod's or a node's namespace and cgroup. What it learns it prints as
//! lines of JSON ([`report`]). Clients that run until they are told end when their stdin closes. Knows no cluster.

mod datagrams;
mod dns;
mod fragments;
mod hold;
mod http;
mod init;
mod probe;
mod raw;
pub mod report;
mod sctp;
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
/// Port at which the server answers SCTP's INIT, where it was told to.
pub const SCTP: u16 = 3_868;

/// Longest that a single answer is waited for unless an argument says otherwise.
const PATIENCE_MS: u64 = 3_000;

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
        /// Nothing but HTTP, over SCTP
        #[arg(long)]
        sctp: bool,
        /// Answer SCTP's INIT as well, by raw sockets: for kernels without SCTP
        #[arg(long, conflicts_with = "sctp")]
        raw_sctp: bool,
    },
    /// One connection per HTTP request; a line for each
    Http {
        server: SocketAddr,
        /// So many, each for itself, until stdin closes
        #[arg(long, default_value_t = 1, conflicts_with = "count")]
        clients: u32,
        /// End after so many; otherwise when stdin closes
        #[arg(long)]
        count: Option<u64>,
        #[arg(long, default_value_t = 0)]
        interval_ms: u64,
        /// Bytes of the body to ask for; 0: the server's name
        #[arg(long, default_value_t = 0)]
        bytes: usize,
        #[arg(long, default_value_t = PATIENCE_MS)]
        timeout_ms: u64,
        /// Over SCTP
        #[arg(long, conflicts_with = "from")]
        sctp: bool,
        /// From this address of the host
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
        /// How long the last echoes are waited for
        #[arg(long, default_value_t = PATIENCE_MS)]
        timeout_ms: u64,
    },
    /// UDP echo with sequence numbers, until stdin closes or so many were sent
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
        /// A socket of its own for each datagram
        #[arg(long, conflicts_with = "connected")]
        fresh: bool,
        /// By a raw socket, in fragments that are sent in this order
        #[arg(long, conflicts_with_all = ["connected", "fresh"])]
        fragments: Option<Order>,
        /// A line for each echo, before the report
        #[arg(long)]
        each: bool,
        /// How long the last echoes are waited for
        #[arg(long, default_value_t = PATIENCE_MS)]
        timeout_ms: u64,
    },
    /// Ask the questions read from stdin, a line of JSON each, all at once; a line for each
    Probe,
    /// Ask a DNS server
    Dns {
        server: SocketAddr,
        name: String,
        #[arg(long = "type", default_value = "a")]
        record: RecordType,
        #[arg(long)]
        tcp: bool,
        #[arg(long, default_value_t = PATIENCE_MS)]
        timeout_ms: u64,
    },
}

/// Runs it to its end.
pub async fn run(command: Command) -> Result<()> {
    let ms = Duration::from_millis;
    match command {
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

/// Until whoever started us closes our stdin.
async fn told_to_end() {
    let mut rest = Vec::new();
    // an unreadable stdin is as good as a closed one
    let _closed = tokio::io::stdin().read_to_end(&mut rest).await;
}

/// Prints a report. Whoever started us may have gone: then nobody wants it.
#[expect(clippy::print_stdout, reason = "reports go to stdout")]
fn print(report: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(report).context("write a report")?);
    Ok(())
}

/// An address as its family writes it: a dual-stack socket shows IPv4 peers as mapped.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
