//! A server outside of the cluster, behind the node's uplink, and the pods that connect to it.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::lab::Namespace;

use super::{
    baselines::{Cluster, Proxy, Routing, node_address},
    load,
    network::{OwnedNamespace, mac_of},
    path::{Location, PORT, TrafficPath},
    plan::{Selection, Variant},
    rules,
    services::ServiceSet,
};

/// The server, an address of the nodes' network that is no node's.
const SERVER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 100);
/// Port of the check, other than that of the load.
const CHECK_PORT: u16 = PORT + 1;
/// Time for the check's connection.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// A server on the bridge of the nodes.
#[derive(Debug)]
pub struct OutsideServer(OwnedNamespace);

impl OutsideServer {
    /// Connects a server to the bridge of a node, whose uplink is `eth0`.
    pub fn attach(
        name: &str,
        (wire, bridge): (&Namespace, &str),
        (node, address): (&Namespace, Ipv4Addr),
    ) -> Result<Self> {
        let server = OwnedNamespace::create(name)?;
        wire.ip(&format!(
            "link add outside type veth peer name eth0 netns {}\n\
             link set outside master {bridge} up",
            server.name()
        ))?;
        server.ip(&format!(
            "link set eth0 up\n\
             addr add {SERVER}/24 dev eth0\n\
             neigh replace {address} lladdr {} dev eth0 nud permanent",
            mac_of(node, "eth0")?
        ))?;
        let mac = mac_of(&server, "eth0")?;
        node.ip(&format!("neigh replace {SERVER} lladdr {mac} dev eth0 nud permanent"))?;
        Ok(Self(server))
    }

    /// Returns the path from a pod to the server.
    fn path(&self, client: Location) -> TrafficPath {
        let listen = SocketAddrV4::new(SERVER, PORT);
        TrafficPath { client, server: self.0.location(), listen, target: listen.into() }
    }
}

/// A pod that connects to the server, and the address that the server must see.
#[derive(Debug)]
struct Client {
    variant: Variant,
    path: TrafficPath,
    source: Ipv4Addr,
    /// `None`: the cluster is another row's too.
    cluster: Option<Cluster>,
    _server: OutsideServer,
}

/// The paths of all selected variants.
#[derive(Debug)]
pub struct Outside {
    clients: Vec<Client>,
}

impl Outside {
    /// Creates the baselines with these Services. `dataplane`: a pod of the datapath, its node's
    /// address, and a server for it.
    pub fn create(
        selection: &Selection,
        services: &ServiceSet,
        dataplane: Option<(Location, Ipv4Addr, OutsideServer)>,
    ) -> Result<Self> {
        let mut clients = Vec::new();
        for (variant, proxy) in [
            (Variant::Plain, Proxy::None),
            (Variant::Masquerade, Proxy::Masquerade),
            (Variant::Nftables, Proxy::Nftables(services)),
            (Variant::Iptables, Proxy::Iptables(services)),
        ] {
            if selection.has(variant) {
                let client = baseline(variant, proxy);
                clients.push(client.with_context(|| format!("cannot create variant {variant}"))?);
            }
        }
        if let Some((client, source, server)) = dataplane {
            let path = server.path(client);
            clients.push(Client { variant: Variant::Ours, path, source, cluster: None, _server: server });
        }
        let outside = Self { clients };
        outside.check_sources()?;
        Ok(outside)
    }

    pub fn paths(&self) -> Vec<(Variant, TrafficPath)> {
        self.clients.iter().map(|client| (client.variant, client.path.clone())).collect()
    }

    /// Checks after traffic that connections were masqueraded, and by connection tracking or not as
    /// intended.
    pub fn check(&self) -> Result<()> {
        self.check_sources()?;
        self.clients
            .iter()
            .filter_map(|client| client.cluster.as_ref())
            .try_for_each(Cluster::check_connection_tracking)
    }

    /// Checks that the server sees the node's address, or the pod's if nothing masquerades.
    fn check_sources(&self) -> Result<()> {
        for Client { variant, path, source, .. } in &self.clients {
            let seen = source_seen(&path.client, &path.server)
                .with_context(|| format!("{variant}: a connection to the server outside"))?;
            ensure!(seen == *source, "{variant}: the server outside sees {seen}, not {source}");
        }
        Ok(())
    }
}

fn baseline(variant: Variant, proxy: Proxy<'_>) -> Result<Client> {
    let name = format!("out-{variant}");
    let cluster = Cluster::create(&name, Routing::Native, proxy)?;
    let (wire, node) = (cluster.wire(), cluster.first());
    let server = OutsideServer::attach(&format!("{name}-server"), (wire, "br0"), (node, node_address(1)))?;
    let pod = cluster.same_node().client;
    let source = match variant {
        Variant::Plain => {
            server.0.ip(&format!("route add 10.244.1.0/24 via {}", node_address(1)))?;
            Cluster::CLIENT
        }
        Variant::Iptables => {
            rules::iptables::apply_masquerade(node, rules::iptables::Backend::best())?;
            node_address(1)
        }
        _ => {
            rules::nftables::apply_masquerade(node)?;
            node_address(1)
        }
    };
    Ok(Client { variant, path: server.path(pod), source, cluster: Some(cluster), _server: server })
}

/// Connects once and returns the source address that the server sees.
fn source_seen(client: &Location, server: &Location) -> Result<IpAddr> {
    let target = SocketAddr::from((SERVER, CHECK_PORT));
    let listener = in_namespace(server, || {
        let listener = TcpListener::bind(target)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    })?;
    let _connected = in_namespace(client, || Ok(TcpStream::connect_timeout(&target, CHECK_TIMEOUT)?))?;
    let started = Instant::now();
    loop {
        match listener.accept() {
            Ok((_, source)) => return Ok(source.ip()),
            Err(error) if error.kind() == ErrorKind::WouldBlock && started.elapsed() < CHECK_TIMEOUT => {
                thread::yield_now();
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Runs `work` on a thread of the namespace.
fn in_namespace<T: Send>(location: &Location, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            load::enter_namespace(&location.namespace)?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
