//! The server of the load generator: an echo over TCP and UDP on one port.
//!
//! It polls while it gets requests and sleeps soon after the last one: in an interleaved run the
//! servers of all variants exist at once, and only the measured one may use processor time.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::BULK;

/// Idle time before the server sleeps.
const LINGER: Duration = Duration::from_millis(20);
/// Idle sockets are polled only in every n-th iteration, as each poll is a system call.
const IDLE_INTERVAL: u32 = 16;

/// Serves forever; calls `ready` once it listens.
pub fn serve(address: SocketAddr, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut server = Server::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    ready()?;
    let mut iteration = 0_u32;
    let mut busy_at = Instant::now();
    loop {
        iteration = iteration.wrapping_add(1);
        if server.poll_once(iteration.is_multiple_of(IDLE_INTERVAL)) {
            busy_at = Instant::now();
        } else if iteration.is_multiple_of(IDLE_INTERVAL) && busy_at.elapsed() > LINGER {
            server.sleep()?;
            busy_at = Instant::now();
        }
    }
}

struct Server {
    listener: TcpListener,
    datagrams: UdpSocket,
    connections: Vec<TcpStream>,
    /// The last request came over UDP.
    udp_is_busy: bool,
}

impl Server {
    fn bind(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let datagrams = UdpSocket::bind(address)?;
        datagrams.set_nonblocking(true)?;
        Ok(Self { listener, datagrams, connections: Vec::new(), udp_is_busy: false })
    }

    /// Polls the busy sockets, or `all`. Returns whether there was a request.
    fn poll_once(&mut self, all: bool) -> bool {
        let mut busy = false;
        if !self.connections.is_empty() {
            busy |= self.serve_connections();
        } else if !self.udp_is_busy || all {
            busy |= self.accept();
        }
        if all && !self.connections.is_empty() {
            busy |= self.accept();
        }
        if (self.udp_is_busy || all) && self.serve_datagram() {
            self.udp_is_busy = true;
            return true;
        }
        if busy {
            self.udp_is_busy = false;
        }
        busy
    }

    fn accept(&mut self) -> bool {
        let Ok((stream, _)) = self.listener.accept() else { return false };
        // a connection that cannot be set up is closed; its client counts an error
        if stream.set_nonblocking(true).is_ok() && stream.set_nodelay(true).is_ok() {
            self.connections.push(stream);
        }
        true
    }

    fn serve_connections(&mut self) -> bool {
        let before = self.connections.len();
        let mut busy = false;
        self.connections.retain_mut(|stream| {
            let mut bytes = [0; 64];
            match stream.read(&mut bytes) {
                Ok(0) => false,
                Ok(_) if bytes[..1] == BULK => {
                    discard(stream);
                    false
                }
                Ok(count) => {
                    busy = true;
                    stream.write_all(&bytes[..count]).is_ok()
                }
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            }
        });
        busy || self.connections.len() != before
    }

    fn serve_datagram(&self) -> bool {
        let mut bytes = [0; 64];
        match self.datagrams.recv_from(&mut bytes) {
            Ok((count, from)) => {
                // the client counts a lost reply
                let _sent = self.datagrams.send_to(&bytes[..count], from);
                true
            }
            Err(_nothing_there) => false,
        }
    }

    fn sleep(&self) -> Result<()> {
        let mut sources = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.datagrams.as_fd(), PollFlags::POLLIN),
        ];
        sources.extend(self.connections.iter().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)));
        match poll(&mut sources, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error).context("cannot wait for a request"),
        }
    }
}

/// Reads until the end without polling: in a bulk run, the server's processor time counts.
fn discard(stream: &mut TcpStream) {
    let mut bytes = vec![0; 256 << 10];
    // the client notices a connection that ends too early
    if stream.set_nonblocking(false).is_ok() {
        while stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
    }
}
