//! The server: responds with its name and the peer's address, and echoes data.
//!
//! HTTP `GET /` returns `NAME PEER` in headers, `GET /bytes/N` a body of N bytes. The TCP echo
//! begins with a line with its name. The UDP echo appends a space and its name; to the datagram
//! `who?` it responds with `NAME PEER`, as it does to an SCTP INIT.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UdpSocket},
    task::spawn_blocking,
};

use super::{canonical, print, raw_sctp, report::Ready, sctp};

/// Receive buffer of the UDP socket.
const RECEIVE_BYTES: usize = 16 << 20;
/// The datagram that requests the server's name and the peer's address.
pub(super) const NAME_REQUEST: &[u8] = b"who?";

/// `init`: the port at which SCTP INITs are answered, if any.
pub(super) async fn run(name: &str, bind: IpAddr, http: u16, echo: u16, init: Option<u16>) -> Result<()> {
    let web = listen(bind, http).await?;
    let tcp = listen(bind, echo).await?;
    let address = SocketAddr::new(bind, echo);
    let udp = UdpSocket::bind(address).await.with_context(|| format!("bind UDP {address}"))?;
    // a server that waits for a CPU must not lose datagrams
    setsockopt(&udp, sockopt::RcvBufForce, &RECEIVE_BYTES).context("enlarge the receive buffer")?;
    let associations =
        init.map(|port| Ok::<_, anyhow::Error>((raw_sctp::Server::both()?, port))).transpose()?;
    print(&Ready { ready: true })?;
    tokio::try_join!(
        answer_inits(name, associations),
        accept(web, name, |stream, peer, name| async move { answer(stream, peer, &name).await }),
        accept(tcp, name, |stream, _, name| async move { echo_stream(stream, &name).await }),
        echo_datagrams(udp, name),
    )?;
    Ok(())
}

/// Serves only HTTP, over SCTP.
pub(super) async fn over_sctp(name: &str, at: SocketAddr) -> Result<()> {
    let web = sctp::listen(at).with_context(|| format!("listen on SCTP {at}"))?;
    print(&Ready { ready: true })?;
    accept(web, name, |stream, peer, name| async move { answer(stream, peer, &name).await }).await
}

/// Runs until a server fails; returns at once if there are none.
async fn answer_inits(name: &str, servers: Option<([raw_sctp::Server; 2], u16)>) -> Result<()> {
    let Some((servers, port)) = servers else { return Ok(()) };
    let [v4, v6] = servers.map(|server| {
        let name = name.to_owned();
        async move { spawn_blocking(move || server.run(&name, port)).await? }
    });
    tokio::try_join!(v4, v6).map(drop)
}

async fn listen(bind: IpAddr, port: u16) -> Result<TcpListener> {
    let address = SocketAddr::new(bind, port);
    TcpListener::bind(address).await.with_context(|| format!("listen on TCP {address}"))
}

async fn accept<F: Future<Output = std::io::Result<()>> + Send + 'static>(
    listener: TcpListener,
    name: &str,
    serve: impl Fn(TcpStream, SocketAddr, String) -> F,
) -> Result<()> {
    loop {
        let (stream, peer) = listener.accept().await?;
        // fails for SCTP, which has another option; small messages are not delayed there
        let _not_of_sctp = stream.set_nodelay(true);
        // the client reports errors of a connection
        tokio::spawn(serve(stream, canonical(peer), name.to_owned()));
    }
}

async fn answer(stream: TcpStream, peer: SocketAddr, name: &str) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    stream.read_line(&mut request).await?;
    let mut header = String::new();
    while stream.read_line(&mut header).await? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/");
    let body = match path.strip_prefix("/bytes/").map(str::parse) {
        Some(Ok(bytes)) => vec![b'x'; bytes],
        _ => Vec::new(),
    };
    let head = format!(
        "HTTP/1.1 200 OK\r\nServer: {name}\r\nX-Client: {peer}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(&body).await?;
    stream.shutdown().await
}

async fn echo_stream(mut stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.write_all(format!("{name}\n").as_bytes()).await?;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buffer[..read]).await?;
    }
}

async fn echo_datagrams(socket: UdpSocket, name: &str) -> Result<()> {
    let mut buffer = vec![0; 65_536];
    loop {
        // an error is an ICMP error about an earlier response
        let Ok((read, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let answer = match &buffer[..read] {
            NAME_REQUEST => format!("{name} {}", canonical(peer)).into_bytes(),
            datagram => [datagram, b" ", name.as_bytes()].concat(),
        };
        let _refused = socket.send_to(&answer, peer).await;
    }
}
