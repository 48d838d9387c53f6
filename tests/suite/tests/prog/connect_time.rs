//! Connect-time translation: which address a socket's peer has, as the application sees it. With
//! real sockets, in a namespace and a cgroup of their own.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use dataplane_common::{abi::NodeConfig, net::Protocol, netns};
use dataplane_testkit::{
    lab::wait,
    prog::{Family, Rig, SocketPrograms, World, at, devices, ip, node_config, rig_with},
};
use nix::{
    libc,
    sys::socket::{SockaddrLike as _, SockaddrStorage, connect},
};

const TIMEOUT: Duration = Duration::from_secs(10);
/// First slots of the services of these tests.
const FIRST: u32 = 200;
const SECOND: u32 = 210;

/// A namespace whose loopback device has every address, two services of one UDP and TCP backend.
struct Node {
    first: SocketAddr,
    second: SocketAddr,
    backend: SocketAddr,
    server: UdpSocket,
    rig: Rig,
    world: World,
    _programs: SocketPrograms,
}

/// Whose sockets a test uses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Pod,
    Host,
}

impl Node {
    fn create(family: Family, of: Of, flags: u32) -> Result<Self> {
        devices::enter_namespace()?;
        let host_netns = match of {
            // no namespace has the cookie 0
            Of::Pod => [0; 8],
            Of::Host => netns::cookie().context("SO_NETNS_COOKIE (Linux 5.14)")?.to_ne_bytes(),
        };
        let config = NodeConfig { flags, host_netns, ..node_config() };
        let (mut rig, world) = rig_with(family, &config)?;
        let first = at(world.service.ip(), 5_353);
        let second = at(world.exempt, 5_354);
        let backend = at(world.wire_pod, 5_300);
        for protocol in [Protocol::TCP, Protocol::UDP] {
            rig.service(first, protocol, FIRST, &[backend], 0)?;
            rig.service(second, protocol, SECOND, &[backend], 0)?;
        }
        let bits = if family == Family::V4 { "32" } else { "128 nodad" };
        for address in [first.ip(), second.ip(), backend.ip(), world.host, world.other_pod] {
            ip(&format!("addr add {address}/{bits} dev lo"))?;
            // the kernel adds the route of an IPv6 address later, in a work queue
            wait::until("the route of an address", TIMEOUT, || {
                ip(&format!("route get {address}")).map(Some)
            })?;
        }
        let programs = rig.attach_sockets()?;
        let server = bind(backend)?;
        Ok(Self { first, second, backend, server, rig, world, _programs: programs })
    }

    /// A client with an address that is no frontend, so that replies find it.
    fn client(&self) -> Result<UdpSocket> {
        bind(at(self.world.other_pod, 0))
    }

    /// Answers one datagram of the client.
    fn answer(&self) -> Result<()> {
        answer(&self.server)
    }
}

fn bind(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).with_context(|| format!("bind {address}"))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

/// Answers one datagram with its own content.
fn answer(server: &UdpSocket) -> Result<()> {
    let mut buffer = [0; 64];
    let (length, client) = server.recv_from(&mut buffer).context("no request")?;
    server.send_to(&buffer[..length], client)?;
    Ok(())
}

/// Receives an answer: its content and the address it is from.
fn receive(client: &UdpSocket) -> Result<(String, SocketAddr)> {
    let mut buffer = [0; 64];
    let (length, from) = client.recv_from(&mut buffer).context("no answer")?;
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), from))
}

/// `connect(AF_UNSPEC)`: for this the kernel runs no program.
fn disconnect(socket: &impl std::os::fd::AsRawFd) -> Result<()> {
    let unspecified = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as u32;
    // SAFETY: the socket is open, and the address is as long as `length` says.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const unspecified, length) };
    ensure!(result == 0, io::Error::last_os_error());
    Ok(())
}

#[test]
fn peer_is_the_backend_after_connecting_to_it_directly() -> Result<()> {
    for family in Family::BOTH {
        let node = Node::create(family, Of::Pod, node_config().flags)?;
        let client = node.client()?;
        client.connect(node.first)?;
        assert_eq!(client.peer_addr()?, node.first);
        client.send(b"service")?;
        node.answer()?;
        assert_eq!(receive(&client)?, ("service".to_owned(), node.first));

        disconnect(&client)?;
        client.connect(node.backend)?;
        assert_eq!(client.peer_addr()?, node.backend);
        client.send(b"backend")?;
        node.answer()?;
        assert_eq!(receive(&client)?, ("backend".to_owned(), node.backend));

        // without `AF_UNSPEC` in between
        client.connect(node.second)?;
        assert_eq!(client.peer_addr()?, node.second);
        client.connect(node.backend)?;
        assert_eq!(client.peer_addr()?, node.backend);

        // not connected at all
        client.connect(node.first)?;
        disconnect(&client)?;
        client.send_to(b"unconnected", node.backend)?;
        node.answer()?;
        assert_eq!(receive(&client)?, ("unconnected".to_owned(), node.backend));
    }
    Ok(())
}

#[test]
fn tcp_peer_is_the_backend_after_connecting_to_it_directly() -> Result<()> {
    for family in Family::BOTH {
        let node = Node::create(family, Of::Pod, node_config().flags)?;
        let listener = TcpListener::bind(node.backend)?;
        let client = TcpStream::connect(node.first)?;
        assert_eq!(client.peer_addr()?, node.first);
        let _accepted = listener.accept()?;
        disconnect(&client)?;
        connect(client.as_raw_fd(), &SockaddrStorage::from(node.backend))?;
        assert_eq!(client.peer_addr()?, node.backend);
    }
    Ok(())
}

#[test]
fn connected_socket_keeps_the_name_of_its_service() -> Result<()> {
    for family in Family::BOTH {
        let node = Node::create(family, Of::Pod, node_config().flags)?;
        let other = bind(node.second)?;
        let client = node.client()?;
        client.connect(node.first)?;
        client.send(b"first")?;
        // left to packets, which give it a source port of its own: this namespace translates none
        client.send_to(b"second", node.second)?;
        node.answer()?;
        assert_eq!(receive(&client)?, ("first".to_owned(), node.first));
        let mut buffer = [0; 64];
        assert_eq!(other.recv_from(&mut buffer)?.0, "second".len());
    }
    Ok(())
}

/// `sendto()` the service that the socket is connected to: the kernel delivers answers of the
/// connected backend only.
#[test]
fn connected_socket_sends_to_its_backend() -> Result<()> {
    const BACKENDS: u16 = 16;
    for family in Family::BOTH {
        let mut node = Node::create(family, Of::Pod, node_config().flags)?;
        let ports = 6_000..6_000 + BACKENDS;
        let backends: Vec<_> = ports.map(|port| at(node.backend.ip(), port)).collect();
        node.rig.service(node.first, Protocol::UDP, FIRST, &backends, 0)?;
        let servers = backends.into_iter().map(bind).collect::<Result<Vec<_>>>()?;
        for server in &servers {
            server.set_nonblocking(true)?;
        }
        for _ in 0..4 {
            let client = node.client()?;
            client.connect(node.first)?;
            client.send(b"send")?;
            client.send_to(b"sendto", node.first)?;
            let received = |server: &UdpSocket| {
                let mut buffer = [0; 64];
                std::iter::from_fn(|| server.recv_from(&mut buffer).ok()).count()
            };
            let counts: Vec<_> = servers.iter().map(received).filter(|count| *count > 0).collect();
            assert_eq!(counts, [2], "one backend got both");
        }
    }
    Ok(())
}

/// `getpeername()` of an MPTCP socket, whose connection is another socket of the kernel.
#[test]
fn mptcp_peer_is_the_service() -> Result<()> {
    for family in Family::BOTH {
        let node = Node::create(family, Of::Pod, node_config().flags)?;
        let domain = if family == Family::V4 { libc::AF_INET } else { libc::AF_INET6 };
        for is_server_mptcp in [false, true] {
            let client = match mptcp(domain) {
                Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
                    println!("SKIP: the kernel has no MPTCP");
                    return Ok(());
                }
                client => client?,
            };
            let listener = if is_server_mptcp {
                listen(mptcp(domain)?, node.backend)?
            } else {
                TcpListener::bind(node.backend)?
            };
            connect(client.as_raw_fd(), &SockaddrStorage::from(node.first))?;
            let client = TcpStream::from(client);
            let (accepted, _) = listener.accept()?;
            assert_eq!(client.peer_addr()?, node.first, "{is_server_mptcp}");
            // a second connection, to the backend itself
            let direct = mptcp(domain)?;
            connect(direct.as_raw_fd(), &SockaddrStorage::from(node.backend))?;
            assert_eq!(TcpStream::from(direct).peer_addr()?, node.backend);
            drop((accepted, client, listener));
        }
    }
    Ok(())
}

fn mptcp(domain: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let socket = unsafe { libc::socket(domain, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_MPTCP) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    let one = 1_i32;
    // SAFETY: the descriptor was just created, and the option is as long as said.
    unsafe {
        let socket = OwnedFd::from_raw_fd(socket);
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            (&raw const one).cast(),
            size_of::<i32>() as u32,
        );
        Ok(socket)
    }
}

fn listen(socket: OwnedFd, address: SocketAddr) -> Result<TcpListener> {
    let address = SockaddrStorage::from(address);
    // SAFETY: the socket is open, and the address as long as said.
    let result = unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr(), address.len()) };
    ensure!(result == 0, io::Error::last_os_error());
    // SAFETY: no pointers.
    ensure!(unsafe { libc::listen(socket.as_raw_fd(), 8) } == 0, io::Error::last_os_error());
    Ok(socket.into())
}

/// Two services with one backend: answers could be of either, so the second is left to packets,
/// whose flow has a source port of its own.
#[test]
fn second_service_of_a_backend_is_left_to_packets() -> Result<()> {
    for family in Family::BOTH {
        let node = Node::create(family, Of::Pod, node_config().flags)?;
        let per_packet = bind(node.second)?;
        let client = node.client()?;
        client.send_to(b"first", node.first)?;
        client.send_to(b"second", node.second)?;
        answer(&per_packet)?;
        node.answer()?;
        assert_eq!(receive(&client)?, ("second".to_owned(), node.second));
        assert_eq!(receive(&client)?, ("first".to_owned(), node.first));
        // another socket may start with the second
        let client = node.client()?;
        client.send_to(b"second", node.second)?;
        node.answer()?;
        assert_eq!(receive(&client)?, ("second".to_owned(), node.second));
    }
    Ok(())
}

/// A host's datagrams are translated at `sendmsg()` only if their packets pass no device hook: a
/// socket then has no answers of another name from that backend.
#[test]
fn host_datagrams_are_translated_only_to_addresses_of_the_node() -> Result<()> {
    for family in Family::BOTH {
        let mut node = Node::create(family, Of::Host, node_config().flags)?;
        let per_packet = bind(node.first)?;
        let own = at(node.world.host, 30_080);
        node.rig.host_with_node_ports(node.world.host)?;
        node.rig.service(own, Protocol::UDP, SECOND, &[node.backend], 0)?;
        let client = node.client()?;
        client.send_to(b"cluster IP", node.first)?;
        client.send_to(b"node port", own)?;
        answer(&per_packet)?;
        node.answer()?;
        assert_eq!(receive(&client)?, ("cluster IP".to_owned(), node.first));
        assert_eq!(receive(&client)?, ("node port".to_owned(), own));
    }
    Ok(())
}

/// Two frontends of the node itself: the second gets another backend.
#[test]
fn second_frontend_of_the_node_gets_another_backend() -> Result<()> {
    for family in Family::BOTH {
        let mut node = Node::create(family, Of::Host, node_config().flags)?;
        let other = at(node.backend.ip(), 5_301);
        let other_server = bind(other)?;
        node.rig.host_with_node_ports(node.world.host)?;
        let (one, two) = (at(node.world.host, 30_080), at(node.world.host, 30_081));
        node.rig.service(one, Protocol::UDP, FIRST, &[node.backend], 0)?;
        node.rig.service(two, Protocol::UDP, SECOND, &[node.backend, other], 0)?;
        for _ in 0..8 {
            let client = node.client()?;
            client.send_to(b"one", one)?;
            client.send_to(b"two", two)?;
            node.answer()?;
            answer(&other_server)?;
            let mut answers = [receive(&client)?, receive(&client)?];
            answers.sort();
            assert_eq!(answers, [("one".to_owned(), one), ("two".to_owned(), two)]);
        }
    }
    Ok(())
}
