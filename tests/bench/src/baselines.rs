//! The baselines: a veth pair, plain Linux routing, and Linux routing with kube-proxy's rules.
//!
//! Each is as fast as possible: no bridge on a node, no neighbour resolution, no rules that
//! kube-proxy would not write, and no connection tracking unless the rules need it.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    network::{OwnedNamespace, attach_pod, enable_forwarding, mac_of, recycle_ports},
    path::{PORT, TrafficPath},
    plan::SERVICE_COUNTS,
    rules::{iptables, nftables},
    services::ServiceSet,
};
use dataplane_testkit::lab::Namespace;

/// The client pod on the first node.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 10);
/// The server pod on the first node.
const LOCAL: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 11);
/// The server pod on the second node.
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 11);

/// MTU of the wire.
const MTU: u32 = 1500;
/// Bytes of VXLAN encapsulation.
const VXLAN_OVERHEAD: u32 = 50;

/// Two namespaces with a veth between them: the cheapest path of the kernel.
#[derive(Debug)]
pub struct Pair {
    client: OwnedNamespace,
    server: OwnedNamespace,
}

impl Pair {
    pub fn create() -> Result<Self> {
        let pair = Self {
            client: OwnedNamespace::create("raw-client")?,
            server: OwnedNamespace::create("raw-server")?,
        };
        let server = pair.server.name();
        pair.client
            .ip(&format!("link add eth0 mtu {MTU} type veth peer name eth0 mtu {MTU} netns {server}"))?;
        let ends = [(&pair.client, CLIENT, &pair.server, LOCAL), (&pair.server, LOCAL, &pair.client, CLIENT)];
        for (here, address, there, other_address) in ends {
            here.ip(&format!("link set eth0 up\naddr add {address}/24 dev eth0"))?;
            let mac = mac_of(there, "eth0")?;
            here.ip(&format!("neigh add {other_address} lladdr {mac} dev eth0 nud permanent"))?;
        }
        recycle_ports(&pair.client)?;
        Ok(pair)
    }

    pub fn path(&self) -> TrafficPath {
        path(&self.client, &self.server, LOCAL)
    }
}

/// How packets are routed between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    Native,
    Vxlan,
}

/// What implements Services.
#[derive(Clone, Copy, Debug)]
pub enum Proxy<'a> {
    /// None: only pod addresses work.
    None,
    /// None, but pods are masqueraded.
    Masquerade,
    Nftables(&'a ServiceSet),
    Iptables(&'a ServiceSet),
}

impl Proxy<'_> {
    fn services(&self) -> usize {
        match self {
            Self::None | Self::Masquerade => 0,
            Self::Nftables(services) | Self::Iptables(services) => services.iter().count(),
        }
    }
}

/// Two nodes on a bridge: client and server pod on the first, a server pod on the second.
#[derive(Debug)]
pub struct Cluster {
    first: OwnedNamespace,
    second: OwnedNamespace,
    client: OwnedNamespace,
    local: OwnedNamespace,
    remote: OwnedNamespace,
    wire: OwnedNamespace,
    tracks_connections: bool,
}

impl Cluster {
    /// Address of the client pod.
    pub const CLIENT: Ipv4Addr = CLIENT;

    pub fn create(name: &str, routing: Routing, proxy: Proxy<'_>) -> Result<Self> {
        let make = |role: &str| OwnedNamespace::create(&format!("{name}-{role}"));
        let cluster = Self {
            first: make("node1")?,
            second: make("node2")?,
            client: make("client")?,
            local: make("local")?,
            remote: make("remote")?,
            wire: make_wire(&format!("{name}-wire"))?,
            tracks_connections: !matches!(proxy, Proxy::None),
        };
        let bridge = cluster.wire.name();
        for (number, node) in [(1, &cluster.first), (2, &cluster.second)] {
            node.ip(&format!(
                "link add eth0 mtu {MTU} type veth peer name port{number} mtu {MTU} netns {bridge}\n\
                 link set eth0 up\n\
                 addr add {}/24 dev eth0",
                node_address(number)
            ))?;
            cluster.wire.ip(&format!("link set port{number} master br0 up"))?;
            enable_forwarding(node)?;
        }
        recycle_ports(&cluster.first)?;
        let mtu = match routing {
            Routing::Native => cluster.route_natively()?,
            Routing::Vxlan => cluster.route_through_vxlan()?,
        };
        attach_pod(&cluster.first, &cluster.client, "pod1", CLIENT, mtu)?;
        attach_pod(&cluster.first, &cluster.local, "pod2", LOCAL, mtu)?;
        attach_pod(&cluster.second, &cluster.remote, "pod1", REMOTE, mtu)?;
        cluster.install(proxy)?;
        Ok(cluster)
    }

    /// Returns the first node.
    pub fn first(&self) -> &Namespace {
        &self.first
    }

    /// Returns both nodes, each with its pod on `pod1`: client and remote server.
    pub fn ends(&self) -> [(&Namespace, &Namespace); 2] {
        [(&self.first, &self.client), (&self.second, &self.remote)]
    }

    /// Returns the namespace of the bridge `br0`, which connects the nodes.
    pub fn wire(&self) -> &Namespace {
        &self.wire
    }

    /// Returns the path between two pods of the first node.
    pub fn same_node(&self) -> TrafficPath {
        path(&self.client, &self.local, LOCAL)
    }

    /// Returns the path from a pod of the first node to a pod of the second.
    pub fn two_nodes(&self) -> TrafficPath {
        path(&self.client, &self.remote, REMOTE)
    }

    /// Returns the path between host processes of the two nodes, without pods.
    pub fn hosts(&self) -> TrafficPath {
        path(&self.first, &self.second, node_address(2))
    }

    /// Checks after traffic that connections are tracked if, and only if, the baseline is meant to.
    pub fn check_connection_tracking(&self) -> Result<()> {
        let count = self.first.read_proc("/proc/sys/net/netfilter/nf_conntrack_count")?;
        let tracked: u64 = count.trim().parse()?;
        ensure!(
            self.tracks_connections == (tracked > 0),
            "{}: unexpected number of tracked connections after traffic: {tracked}",
            self.first.name()
        );
        Ok(())
    }

    fn route_natively(&self) -> Result<u32> {
        for (here, node, there) in [(1, &self.first, 2), (2, &self.second, 1)] {
            let other = if here == 1 { &self.second } else { &self.first };
            node.ip(&format!(
                "neigh add {} lladdr {} dev eth0 nud permanent\n\
                 route add 10.244.{there}.0/24 via {} dev eth0",
                node_address(there),
                mac_of(other, "eth0")?,
                node_address(there)
            ))?;
        }
        Ok(MTU)
    }

    /// As flannel: a device without learning, a static forwarding entry and neighbour per node.
    fn route_through_vxlan(&self) -> Result<u32> {
        let mtu = MTU - VXLAN_OVERHEAD;
        for (number, node) in [(1, &self.first), (2, &self.second)] {
            node.ip(&format!(
                "link add flannel.1 mtu {mtu} type vxlan id 1 dev eth0 local {} dstport 8472 nolearning\n\
                 addr add 10.244.{number}.0/32 dev flannel.1\n\
                 link set flannel.1 up",
                node_address(number)
            ))?;
        }
        for (node, other, there) in [(&self.first, &self.second, 2), (&self.second, &self.first, 1)] {
            let mac = mac_of(other, "flannel.1")?;
            node.ip(&format!(
                "neigh add {} lladdr {} dev eth0 nud permanent\n\
                 neigh add 10.244.{there}.0 lladdr {mac} dev flannel.1 nud permanent\n\
                 route add 10.244.{there}.0/24 via 10.244.{there}.0 dev flannel.1 onlink",
                node_address(there),
                mac_of(other, "eth0")?
            ))?;
            forwarding_entry(node, &mac, node_address(there))?;
        }
        Ok(mtu)
    }

    /// Loads the rules; many rules only on the client's node, as loading is slow.
    fn install(&self, proxy: Proxy<'_>) -> Result<()> {
        let nodes = [(1, &self.first), (2, &self.second)];
        let few = proxy.services() <= SERVICE_COUNTS[0].into();
        for (number, node) in nodes.into_iter().take(if few { 2 } else { 1 }) {
            match proxy {
                Proxy::None | Proxy::Masquerade => {}
                Proxy::Nftables(services) => nftables::apply(node, services, node_address(number))?,
                Proxy::Iptables(services) => iptables::apply(node, services, iptables::Backend::best())?,
            }
        }
        Ok(())
    }
}

/// Returns the backend of the measured Service.
pub const fn service_backend() -> SocketAddrV4 {
    SocketAddrV4::new(LOCAL, PORT)
}

/// Returns the address of a node.
pub const fn node_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 18, 0, number)
}

/// Adds a static forwarding entry with the program `bridge`.
fn forwarding_entry(node: &Namespace, mac: &str, to: Ipv4Addr) -> Result<()> {
    let arguments = format!("-n {} fdb append {mac} dev flannel.1 dst {to} self permanent", node.name());
    let output = Command::new("bridge")
        .args(arguments.split(' '))
        .output()
        .context("cannot run bridge (package iproute2)")?;
    ensure!(
        output.status.success(),
        "bridge {arguments} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn make_wire(name: &str) -> Result<OwnedNamespace> {
    let wire = OwnedNamespace::create(name)?;
    wire.ip(&format!(
        "link add br0 mtu {MTU} type bridge forward_delay 0 mcast_snooping 0\nlink set br0 up"
    ))?;
    Ok(wire)
}

fn path(client: &OwnedNamespace, server: &OwnedNamespace, address: Ipv4Addr) -> TrafficPath {
    let listen = SocketAddrV4::new(address, PORT);
    TrafficPath { client: client.location(), server: server.location(), listen, target: listen.into() }
}
