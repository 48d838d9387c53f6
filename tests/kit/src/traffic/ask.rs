//! One unconnected UDP socket asks several echo servers at once: which address each answer has.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

use super::print;

/// Prints the sources of the answers in the order of `servers`.
pub(super) async fn run(servers: &[SocketAddr], timeout: Duration) -> Result<()> {
    let any: IpAddr = match servers.first().context("no server")? {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await.context("bind a UDP socket")?;
    for (number, server) in servers.iter().enumerate() {
        let _sent = socket.send_to(format!("{number}:").as_bytes(), server).await?;
    }
    let mut sources: Vec<Option<SocketAddr>> = vec![None; servers.len()];
    let deadline = Instant::now() + timeout;
    let mut buffer = [0; 256];
    while sources.contains(&None) {
        let Ok(received) = timeout_at(deadline, socket.recv_from(&mut buffer)).await else { break };
        let (length, source) = received?;
        let text = str::from_utf8(&buffer[..length])?;
        let number: usize = text.split(':').next().context("an empty answer")?.parse()?;
        sources[number] = Some(source);
    }
    print(&sources)
}
