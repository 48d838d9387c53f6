//! The server: says who it is and whom it sees, and gives back what it gets.
//!
//! HTTP `GET /` answers `NAME PEER`, `GET /bytes/N` as many bytes. The TCP echo greets with its name on a line. The UDP
//! echo appends a space and its name; to the datagram `who?` it answers as HTTP does. So it does to SCTP's INIT.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UdpSocket},
    task::spawn_blocking,
};

use super::{canonical, print, raw, report::Ready, sctp};

/// The datagram that asks the echo for its name and the peer's address.
pub(super) const WHO: &[u8] = b"who?";

/// `init`: the port at which INITs of SCTP are answered, if they are.
pub(super) async fn run(name: &str, bind: IpAddr, http: u16, echo: u16, init: Option<u16>) -> Result<()> {
    let web = listen(bind, http).await?;
    let tcp = listen(bind, echo).await?;
    let address = SocketAddr::new(bind, echo);
    let udp = UdpSocket::bind(address).await.with_context(|| format!("bind UDP {address}"))?;
    let associations = init.map(|port| Ok::<_, anyhow::Error>((raw::Server::both()?, port))).transpose()?;
    print(&Ready { ready: true })?;
    tokio::try_join!(
        answer_inits(name, associations),
        accept(web, name, |stream, peer, name| async move { answer(stream, peer, &name).await }),
        accept(tcp, name, |stream, _, name| async move { echo_stream(stream, &name).await }),
        echo_datagrams(udp, name),
    )?;
    Ok(())
}

/// As HTTP over TCP; nothing else.
pub(super) async fn over_sctp(name: &str, at: SocketAddr) -> Result<()> {
    let web = sctp::listen(at).with_context(|| format!("listen on SCTP {at}"))?;
    print(&Ready { ready: true })?;
    accept(web, name, |stream, peer, name| async move { answer(stream, peer, &name).await }).await
}

/// Until one of them fails; at once, if there are none.
async fn answer_inits(name: &str, servers: Option<([raw::Server; 2], u16)>) -> Result<()> {
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
        // SCTP knows another option of this purpose; nothing here waits for it
        let _not_of_sctp = stream.set_nodelay(true);
        // what becomes of a connection is its client's to tell
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
        // an error is that of an earlier answer nobody wanted
        let Ok((read, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let answer = match &buffer[..read] {
            WHO => format!("{name} {}", canonical(peer)).into_bytes(),
            datagram => [datagram, b" ", name.as_bytes()].concat(),
        };
        let _refused = socket.send_to(&answer, peer).await;
    }
}
